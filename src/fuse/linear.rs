//! Factors of a result that are linear in the stacked ones, column by column: made a few columns at a time, and known from
//! the Grams before they are made.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use faer::prelude::ReborrowMut;
use faer::{Mat, MatMut, MatRef};

use crate::algebra::Spread;
use crate::error::Result;
use crate::fuse::compare::Maps;
use crate::fuse::factors::{Batch, Factors, Frame, Rows};

/// What puts a column of the result in its place, of a column of the stack.
type Column = dyn Fn(&[f64], &mut [f64]) + Send + Sync;

/// A factor `[K, n]` of the stacked one `[P, n]`.
#[derive(Clone)]
pub enum Linear {
    /// The stacked one as it is.
    Same,
    /// This, `[K, P]`, times it.
    Map(Mat<f64>),
    /// Column by column, K numbers each, in less time than a map.
    Columns(usize, Arc<Column>),
}

impl Linear {
    /// K numbers of each column of the stack, which `make` puts in their place.
    pub(super) fn columns(rank: usize, make: impl Fn(&[f64], &mut [f64]) + Send + Sync + 'static) -> Linear {
        Linear::Columns(rank, Arc::new(make))
    }

    /// `Σₑ cₑ Xₑ`; the ranks must be equal.
    pub(super) fn sum(frame: &Frame, c: &[f64]) -> Linear {
        let (rank, c) = (frame.block(0).len(), c.to_vec());
        Linear::columns(rank, move |column, out| {
            out.fill(0.0);
            for (c, own) in c.iter().zip(column.chunks_exact(rank.max(1))) {
                out.iter_mut().zip(own).for_each(|(out, x)| *out += c * x);
            }
        })
    }

    /// Row p times `by[p]`.
    pub(super) fn scaled(by: Vec<f64>) -> Linear {
        Linear::columns(by.len(), move |column, out| {
            out.iter_mut().zip(column).zip(&by).for_each(|((out, x), by)| *out = x * by);
        })
    }

    /// The rows `at`.
    pub(super) fn rows(at: Range<usize>) -> Linear {
        Linear::columns(at.len(), move |column, out| out.copy_from_slice(&column[at.clone()]))
    }

    /// K, of a stack of rank P.
    pub fn rank(&self, p: usize) -> usize {
        match self {
            Linear::Same => p,
            Linear::Map(map) => map.nrows(),
            Linear::Columns(rank, _) => *rank,
        }
    }

    /// This of what `before`, `[P, P]`, makes of the stack.
    pub(super) fn after(self, before: Option<MatRef<'_, f64>>) -> Linear {
        match before {
            Some(before) => Linear::Map(self.of(before, Spread::Thread)),
            None => self,
        }
    }

    /// It of `x[P, n]`.
    pub(super) fn of(&self, x: MatRef<'_, f64>, spread: Spread) -> Mat<f64> {
        let mut out = Mat::zeros(self.rank(x.nrows()), x.ncols());
        self.put(out.as_mut(), x, spread);
        out
    }

    /// [`Linear::of`] into `out`.
    pub(super) fn put(&self, mut out: MatMut<'_, f64>, x: MatRef<'_, f64>, spread: Spread) {
        match self {
            Linear::Same => out.copy_from(x),
            Linear::Map(map) => spread.product_into(out, map.as_ref(), x),
            Linear::Columns(rank, make) => {
                let (mut from, mut made) = (vec![0.0; x.nrows()], vec![0.0; *rank]);
                for (mut out, x) in out.col_iter_mut().zip(x.col_iter()) {
                    if let (Some(out), Some(x)) = (out.rb_mut().try_as_col_major_mut(), x.try_as_col_major())
                    {
                        make(x.as_slice(), out.as_slice_mut());
                        continue;
                    }
                    from.iter_mut().zip(x.iter()).for_each(|(from, x)| *from = *x);
                    make(&from, &mut made);
                    out.iter_mut().zip(&made).for_each(|(out, made)| *out = *made);
                }
            }
        }
    }

    /// The whole factor.
    pub(super) fn factor(&self, stack: &Rows, spread: Spread) -> Rows {
        if matches!(self, Linear::Same) {
            return stack.clone();
        }
        let rank = self.rank(stack.rank());
        let mut numbers = vec![0.0; rank * stack.columns()];
        let out = MatMut::from_column_major_slice_mut(&mut numbers, rank, stack.columns());
        self.put(out, stack.get(), spread);
        Rows::new(numbers, rank)
    }
}

impl fmt::Debug for Linear {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Linear::Same => f.write_str("Same"),
            Linear::Map(map) => write!(f, "Map({:?})", map.shape()),
            Linear::Columns(rank, _) => write!(f, "Columns({rank})"),
        }
    }
}

/// Both factors of a result, `Bᵀ[K, O]` and `A[K, I]`.
#[derive(Clone, Debug)]
pub struct Pair {
    /// `Bᵀ` of the stacked one.
    pub bt: Linear,
    /// A of the stacked one.
    pub a: Linear,
}

impl Pair {
    /// K, of a stack of rank P.
    pub fn rank(&self, p: usize) -> usize {
        self.a.rank(p)
    }

    /// It of what `resolution` makes of the updates.
    pub(super) fn after(self, resolution: Option<&Maps>) -> Pair {
        let left = resolution.and_then(|maps| maps.left.as_ref()).map(|w| w.transpose());
        let right = resolution.and_then(|maps| maps.right.as_ref()).map(Mat::as_ref);
        Pair { bt: self.bt.after(left), a: self.a.after(right) }
    }

    /// The factors, B of the first stack and A of the second.
    pub(super) fn factors(&self, b: &Batch, a: &Batch) -> Result<Factors> {
        let spread = b.frame.spread();
        Factors::new(self.bt.factor(b.stack.rows_bt(), spread), self.a.factor(a.stack.rows_a(), spread))
    }
}

/// A result: its factors, or what makes them of the updates as read.
#[derive(Clone, Debug)]
pub enum Made {
    /// The factors.
    Factors(Factors),
    /// Each of the stacked one.
    Pair(Pair),
}

impl Made {
    /// The rank of the result.
    pub fn rank(&self, read: &Frame) -> usize {
        match self {
            Made::Factors(factors) => factors.rank(),
            Made::Pair(pair) => pair.rank(read.rank()),
        }
    }

    /// The factors.
    pub fn factors(&self, read: &Batch) -> Result<Factors> {
        match self {
            Made::Factors(factors) => Ok(factors.clone()),
            Made::Pair(pair) => pair.factors(read, read),
        }
    }
}
