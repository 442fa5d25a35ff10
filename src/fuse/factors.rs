//! The factors of low-rank updates: one update, and the stacked updates of one module.

use std::ops::Range;
use std::sync::Arc;

use faer::{Mat, MatRef};

use crate::algebra::Spread;
use crate::checkpoint::module::Module;
use crate::error::{Error, Result};
use crate::fuse::input_gram::BlockInputs;

/// Numbers of a module's stacked factors above which it is worked on alone: 256 MiB of f64.
const ALONE: usize = 1 << 25;
/// Rows that are turned into columns at once: as many numbers as a line of the cache holds, and lines as one set of it.
const TURNED: usize = 8;

/// A factor: R rows of n numbers, column after column, so that the numbers lie as those of B do in its file. A copy
/// shares them.
#[derive(Clone, Debug)]
pub struct Rows {
    numbers: Arc<Vec<f64>>,
    rank: usize,
}

impl Rows {
    /// R rows of `numbers`, column after column; as many columns as there are.
    pub fn new(numbers: Vec<f64>, rank: usize) -> Rows {
        Rows { numbers: Arc::new(numbers), rank }
    }

    /// R rows of `numbers`, row after row.
    pub fn from_rows(numbers: &[f64], rank: usize) -> Rows {
        Rows::new(turned(numbers, numbers.len().checked_div(rank).unwrap_or(0)), rank)
    }

    /// `[R, n]`.
    pub fn get(&self) -> MatRef<'_, f64> {
        MatRef::from_column_major_slice(&self.numbers, self.rank, self.columns())
    }

    /// Column after column.
    pub fn numbers(&self) -> &[f64] {
        &self.numbers
    }

    /// Column after column, to write; copied where they are shared.
    pub fn numbers_mut(&mut self) -> &mut [f64] {
        Arc::<Vec<f64>>::make_mut(&mut self.numbers)
    }

    /// R.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// n.
    pub fn columns(&self) -> usize {
        self.numbers.len().checked_div(self.rank).unwrap_or(0)
    }

    /// Whether the two share their numbers.
    pub fn is(&self, other: &Rows) -> bool {
        Arc::ptr_eq(&self.numbers, &other.numbers)
    }
}

impl From<Mat<f64>> for Rows {
    fn from(x: Mat<f64>) -> Rows {
        let mut numbers = Vec::with_capacity(x.nrows() * x.ncols());
        (0..x.ncols()).for_each(|j| numbers.extend_from_slice(x.col_as_slice(j)));
        Rows::new(numbers, x.nrows())
    }
}

/// The columns, one after the other, of a matrix that lies row by row, `width` numbers each.
fn turned(x: &[f64], width: usize) -> Vec<f64> {
    let mut out = vec![0.0; x.len()];
    let height = x.len().checked_div(width).unwrap_or(0);
    for (n, rows) in x.chunks(TURNED * width.max(1)).enumerate() {
        for k in 0..width {
            let column = out[k * height + n * TURNED..].iter_mut();
            rows[k..].iter().step_by(width).zip(column).for_each(|(x, out)| *out = *x);
        }
    }
    out
}

/// A product `ΔW = B A` with `B[O, R]` and `A[R, I]`, the scale folded into B; B is held transposed.
#[derive(Clone, Debug)]
pub struct Factors {
    /// `Bᵀ[R, O]`.
    bt: Rows,
    /// `A[R, I]`.
    a: Rows,
}

impl Factors {
    /// From `Bᵀ[R, O]` and `A[R, I]`; fails where the ranks differ.
    pub fn new(bt: impl Into<Rows>, a: impl Into<Rows>) -> Result<Factors> {
        let (bt, a) = (bt.into(), a.into());
        if bt.rank != a.rank {
            return Err(Error::Op {
                op: "fuse",
                why: format!("lora_B has rank {}, lora_A has rank {}: they must be equal", bt.rank, a.rank),
            });
        }
        Ok(Factors { bt, a })
    }

    /// `R` zero columns of B and rows of A, of a module of `size` `(O, I)`.
    pub fn zeros(rank: usize, size: (usize, usize)) -> Factors {
        let zeros = |n: usize| Rows::new(vec![0.0; rank * n], rank);
        Factors { bt: zeros(size.0), a: zeros(size.1) }
    }

    /// Puts `scale · b` and `a`, row by row as in a file (`b[O, R]`, `a[R, I]`), at the rows `at` of the stack.
    pub(crate) fn place(&mut self, at: Range<usize>, b: &[f64], a: &[f64], scale: f64) {
        let (r, i, rank) = (at.len(), self.a.columns(), self.rank());
        // B lies in the file as the columns of Bᵀ do in memory, A across them.
        let columns = self.bt.numbers_mut().chunks_exact_mut(rank);
        for (column, b) in columns.zip(b.chunks_exact(r)) {
            column[at.clone()].iter_mut().zip(b).for_each(|(out, b)| *out = scale * b);
        }
        for (n, columns) in self.a.numbers_mut().chunks_mut(TURNED * rank).enumerate() {
            for k in 0..r {
                let row = &a[k * i + n * TURNED..];
                columns[at.start + k..].iter_mut().step_by(rank).zip(row).for_each(|(out, a)| *out = *a);
            }
        }
    }

    /// `B[O, R]` row by row, as in a file.
    pub fn b_rows(&self) -> &[f64] {
        self.bt.numbers()
    }

    /// `A[R, I]` row by row, as in a file.
    pub fn a_rows(&self) -> Vec<f64> {
        turned(self.a.numbers(), self.rank())
    }

    /// `Bᵀ[R, O]`, shared.
    pub fn rows_bt(&self) -> &Rows {
        &self.bt
    }

    /// `A[R, I]`, shared.
    pub fn rows_a(&self) -> &Rows {
        &self.a
    }

    /// Whether no number is NaN or infinite.
    pub fn is_finite(&self) -> bool {
        let finite = |x: &Rows| x.numbers.iter().all(|x| x.is_finite());
        finite(&self.bt) && finite(&self.a)
    }

    /// `B[O, R]`.
    pub fn b(&self) -> MatRef<'_, f64> {
        self.bt().transpose()
    }

    /// `Bᵀ[R, O]`.
    pub fn bt(&self) -> MatRef<'_, f64> {
        self.bt.get()
    }

    /// `A[R, I]`.
    pub fn a(&self) -> MatRef<'_, f64> {
        self.a.get()
    }

    /// R.
    pub fn rank(&self) -> usize {
        self.a.rank
    }

    /// `(O, I)`.
    pub fn size(&self) -> (usize, usize) {
        (self.bt.columns(), self.a.columns())
    }

    /// Whether all threads share work on such a product.
    pub(crate) fn is_large(&self) -> bool {
        self.bt.numbers.len().saturating_add(self.a.numbers.len()) > ALONE
    }

    /// Row o of B times `rows[o]`, column i of A times `columns[i]`, where given.
    pub fn scaled(&self, rows: Option<&[f64]>, columns: Option<&[f64]>) -> Factors {
        let scale = |x: &Rows, by: Option<&[f64]>| {
            let mut out = x.clone();
            if let Some(by) = by {
                let columns = out.numbers_mut().chunks_exact_mut(x.rank.max(1));
                columns.zip(by).for_each(|(column, c)| column.iter_mut().for_each(|x| *x *= c));
            }
            out
        };
        Factors { bt: scale(&self.bt, rows), a: scale(&self.a, columns) }
    }
}

/// What pruning left of a module at one edge: which output rows and input columns its adapter was trained on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// Kept rows of B, ascending; none = all.
    pub rows: Option<Vec<usize>>,
    /// Kept columns of A, ascending; none = all.
    pub columns: Option<Vec<usize>>,
}

/// Which updates of one module are put together, and how they count: everything but the numbers.
#[derive(Clone, Debug)]
pub struct Frame {
    /// Which module.
    pub module: Module,
    /// `(O, I)`.
    pub size: (usize, usize),
    /// The positions of the E adapters among all that are fused; one that lacks the module is not among them.
    pub members: Vec<usize>,
    /// The bounds of each adapter's rows in the stack: E + 1 of them, from 0 to P.
    bounds: Vec<usize>,
    /// One weight an adapter.
    pub weights: Vec<f64>,
    /// The scale of each adapter, which its B carries.
    pub scales: Vec<f64>,
    /// What each edge's pruning kept of this module.
    pub kept: Vec<Kept>,
    /// Whether the adapters declare that they were trained with one frozen A₀.
    pub frozen: bool,
    /// The least magnitude of an entry of each update that `ties` keeps, as bits of an f32, where it does not follow from
    /// the module alone.
    pub least: Option<Vec<u32>>,
}

impl Frame {
    /// Of E adapters of these ranks; weights `1/E`, scales 1, all adapters there, nothing pruned, A not frozen.
    pub fn new(module: Module, size: (usize, usize), ranks: &[usize]) -> Frame {
        let mut bounds = vec![0];
        for r in ranks {
            bounds.push(bounds[bounds.len() - 1] + r);
        }
        let e = ranks.len();
        Frame {
            module,
            size,
            members: (0..e).collect(),
            bounds,
            weights: vec![1.0 / e as f64; e],
            scales: vec![1.0; e],
            kept: vec![Kept::default(); e],
            frozen: false,
            least: None,
        }
    }

    /// E.
    pub fn edges(&self) -> usize {
        self.bounds.len() - 1
    }

    /// P.
    pub fn rank(&self) -> usize {
        self.bounds[self.edges()]
    }

    /// Whether modules of this size are worked on side by side, a thread each, or one after the other by all threads.
    pub(crate) fn spread(&self) -> Spread {
        let numbers = self.rank().saturating_mul(self.size.0.saturating_add(self.size.1));
        if numbers > ALONE { Spread::Pool } else { Spread::Thread }
    }

    /// Whether all threads share one such module.
    pub fn is_large(&self) -> bool {
        self.spread() == Spread::Pool
    }

    /// The rank of each adapter.
    pub fn ranks(&self) -> Vec<usize> {
        self.bounds.windows(2).map(|w| w[1] - w[0]).collect()
    }

    /// Where each adapter's rows in the stack begin, and where the last ones end: E + 1 numbers.
    pub fn bounds(&self) -> &[usize] {
        &self.bounds
    }

    /// The rows of the stack that are adapter `e`'s.
    pub fn block(&self, e: usize) -> Range<usize> {
        self.bounds[e]..self.bounds[e + 1]
    }

    /// `cₑ` repeated for each of adapter e's rows: one number a row of the stack.
    pub fn along_rank(&self, c: &[f64]) -> Vec<f64> {
        (0..self.edges()).flat_map(|e| vec![c[e]; self.block(e).len()]).collect()
    }

    /// Whether the edges kept different columns of A.
    pub fn columns_differ(&self) -> bool {
        self.kept.windows(2).any(|k| k[0].columns != k[1].columns)
    }
}

/// The updates of E adapters to one module, stacked: `[B₁ … B_E]` and `[A₁; …; A_E]` of rank P.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Whose they are and how they count.
    pub frame: Frame,
    /// The stacked factors, scales folded into B.
    pub stack: Factors,
    /// What each adapter's inputs look like, where it is known: one a member, or none at all.
    inputs: BlockInputs,
}

impl Batch {
    /// Fails where the stack has not the frame's rank and size.
    pub fn new(frame: Frame, stack: Factors) -> Result<Batch> {
        if (stack.rank(), stack.size()) != (frame.rank(), frame.size) {
            return Err(Error::Op {
                op: "fuse",
                why: format!(
                    "{}: the stacked factors have rank {} and size {:?}, expected {} and {:?}",
                    frame.module,
                    stack.rank(),
                    stack.size(),
                    frame.rank(),
                    frame.size
                ),
            });
        }
        Ok(Batch { frame, stack, inputs: BlockInputs::default() })
    }

    /// The same adapters with other factors of the same ranks and size.
    pub fn with_stack(&self, stack: Factors) -> Batch {
        Batch { frame: self.frame.clone(), stack, inputs: self.inputs.clone() }
    }

    /// The same updates with the Gram of each member's inputs.
    pub fn with_inputs(self, inputs: impl Into<BlockInputs>) -> Batch {
        Batch { inputs: inputs.into(), ..self }
    }

    /// The Gram of each member's inputs; fails where they are not known, naming `--grams`.
    pub fn inputs(&self) -> Result<&BlockInputs> {
        let known = self.inputs.grams().len();
        if known == self.frame.edges() {
            return Ok(&self.inputs);
        }
        Err(Error::Usage(format!(
            "{}: {known} input Grams for {} adapters, expected one each: give --grams DIR,… in the adapters' order",
            self.frame.module,
            self.frame.edges()
        )))
    }

    /// `Bᵀ[R, O]` of adapter `e`.
    pub fn bt(&self, e: usize) -> MatRef<'_, f64> {
        let r = self.frame.block(e);
        self.stack.bt().subrows(r.start, r.len())
    }

    /// `A[R, I]` of adapter `e`.
    pub fn a(&self, e: usize) -> MatRef<'_, f64> {
        let r = self.frame.block(e);
        self.stack.a().subrows(r.start, r.len())
    }
}
