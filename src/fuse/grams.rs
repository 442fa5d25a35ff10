//! The two Gram matrices of a stack of factors: all that conflict resolution needs to know about O and I.

use std::ops::Range;

use faer::{Mat, MatRef};

use crate::algebra::{congruence, gram, inner};
use crate::fuse::factors::Batch;

/// `[B₁ … B_E]ᵀ [B₁ … B_E]` and `[A₁; …; A_E] [A₁; …; A_E]ᵀ`, both `[P, P]`.
#[derive(Clone, Debug)]
pub struct Grams {
    /// Of the B factors.
    pub b: Mat<f64>,
    /// Of the A factors.
    pub a: Mat<f64>,
    bounds: Vec<usize>,
}

impl Grams {
    /// From the two Grams, row by row or column by column, and the bounds of each adapter's rows.
    pub fn new(b: &[f64], a: &[f64], bounds: &[usize]) -> Grams {
        let p = bounds.last().copied().unwrap_or(0);
        let [b, a] = [b, a].map(|x| MatRef::from_column_major_slice(x, p, p).to_owned());
        Grams { b, a, bounds: bounds.to_vec() }
    }

    /// Of a batch, on this thread.
    pub fn of(batch: &Batch) -> Grams {
        let (b, a) = (gram(batch.stack.bt()), gram(batch.stack.a()));
        Grams { b, a, bounds: batch.frame.bounds().to_vec() }
    }

    /// E.
    pub fn edges(&self) -> usize {
        self.bounds.len() - 1
    }

    /// P.
    pub fn rank(&self) -> usize {
        self.a.nrows()
    }

    /// The rows of adapter `e`.
    pub fn block(&self, e: usize) -> Range<usize> {
        self.bounds[e]..self.bounds[e + 1]
    }

    /// Where each adapter's rows begin, and where the last end.
    pub fn bounds(&self) -> &[usize] {
        &self.bounds
    }

    /// The Grams of the transposed updates `ΔWᵀ = Aᵀ Bᵀ`.
    pub fn transposed(&self) -> Grams {
        Grams { b: self.a.clone(), a: self.b.clone(), bounds: self.bounds.clone() }
    }

    /// The Grams after B became `B left` and A became `right A`, where given.
    pub fn mapped(&self, left: Option<MatRef<'_, f64>>, right: Option<MatRef<'_, f64>>) -> Grams {
        Grams {
            b: left.map_or_else(|| self.b.clone(), |w| congruence(self.b.as_ref(), w)),
            a: right.map_or_else(|| self.a.clone(), |w| congruence(self.a.as_ref(), w.transpose())),
            bounds: self.bounds.clone(),
        }
    }

    /// `⟨Dᵢ, Dⱼ⟩`, the Frobenius products of the updates, `[E, E]`.
    pub fn products(&self) -> Mat<f64> {
        let sub = |x: &Mat<f64>, i: usize, j: usize| {
            let (r, c) = (self.block(i), self.block(j));
            x.submatrix(r.start, c.start, r.len(), c.len()).to_owned()
        };
        let e = self.edges();
        let mut out = Mat::zeros(e, e);
        for i in 0..e {
            for j in 0..=i {
                let p = inner(sub(&self.b, i, j).as_ref(), sub(&self.a, i, j).as_ref());
                out[(i, j)] = p;
                out[(j, i)] = p;
            }
        }
        out
    }
}
