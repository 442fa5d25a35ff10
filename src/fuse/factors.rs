//! The factors of low-rank updates: one update, and the stacked updates of one module.

use std::ops::Range;

use faer::{Mat, MatRef, unzip, zip};

use crate::checkpoint::input_grams::InputGram;
use crate::checkpoint::module::Module;
use crate::error::{Error, Result};

/// A product `ΔW = B A` with `B[O, R]` and `A[R, I]`, the scale folded into B.
///
/// B is held transposed, so that both factors are R rows of a long matrix and B's layout in memory is its file's.
#[derive(Clone, Debug)]
pub struct Factors {
    /// `Bᵀ[R, O]`.
    bt: Mat<f64>,
    /// `A[R, I]`.
    a: Mat<f64>,
}

impl Factors {
    /// From `Bᵀ[R, O]` and `A[R, I]`; fails where the ranks differ.
    pub fn new(bt: Mat<f64>, a: Mat<f64>) -> Result<Factors> {
        if bt.nrows() != a.nrows() {
            return Err(Error::Op {
                op: "fuse",
                why: format!(
                    "lora_B has rank {}, lora_A has rank {}: they must be equal",
                    bt.nrows(),
                    a.nrows()
                ),
            });
        }
        Ok(Factors { bt, a })
    }

    /// `R` zero columns of B and rows of A, of a module of `size` `(O, I)`.
    pub fn zeros(rank: usize, size: (usize, usize)) -> Factors {
        Factors { bt: Mat::zeros(rank, size.0), a: Mat::zeros(rank, size.1) }
    }

    /// Puts `scale · b` and `a`, row by row as in a file (`b[O, R]`, `a[R, I]`), at the rows `at` of the stack.
    pub(crate) fn place(&mut self, at: Range<usize>, b: &[f64], a: &[f64], scale: f64) {
        let (r, i) = (at.len(), self.a.ncols());
        // B lies in the file as the columns of Bᵀ do in memory, A across them.
        for (o, b) in b.chunks_exact(r).enumerate() {
            for (out, b) in self.bt.col_as_slice_mut(o)[at.clone()].iter_mut().zip(b) {
                *out = scale * b;
            }
        }
        for x in 0..i {
            for (k, out) in self.a.col_as_slice_mut(x)[at.clone()].iter_mut().enumerate() {
                *out = a[k * i + x];
            }
        }
    }

    /// `B[O, R]` row by row, as in a file.
    pub fn b_rows(&self) -> Vec<f64> {
        (0..self.bt.ncols()).flat_map(|o| self.bt.col_as_slice(o)).copied().collect()
    }

    /// `A[R, I]` row by row, as in a file.
    pub fn a_rows(&self) -> Vec<f64> {
        let (r, i) = (self.a.nrows(), self.a.ncols());
        let mut out = vec![0.0; r * i];
        for x in 0..i {
            for (k, a) in self.a.col_as_slice(x).iter().enumerate() {
                out[k * i + x] = *a;
            }
        }
        out
    }

    /// Whether no number is NaN or infinite.
    pub fn is_finite(&self) -> bool {
        self.bt.is_all_finite() && self.a.is_all_finite()
    }

    /// `B[O, R]`.
    pub fn b(&self) -> MatRef<'_, f64> {
        self.bt.transpose()
    }

    /// `Bᵀ[R, O]`.
    pub fn bt(&self) -> MatRef<'_, f64> {
        self.bt.as_ref()
    }

    /// `A[R, I]`.
    pub fn a(&self) -> MatRef<'_, f64> {
        self.a.as_ref()
    }

    /// R.
    pub fn rank(&self) -> usize {
        self.a.nrows()
    }

    /// `(O, I)`.
    pub fn size(&self) -> (usize, usize) {
        (self.bt.ncols(), self.a.ncols())
    }

    /// Row o of B times `rows[o]`, column i of A times `columns[i]`, where given.
    pub fn scaled(&self, rows: Option<&[f64]>, columns: Option<&[f64]>) -> Factors {
        let scale = |x: &Mat<f64>, by: Option<&[f64]>| match by {
            Some(s) => Mat::from_fn(x.nrows(), x.ncols(), |r, j| x[(r, j)] * s[j]),
            None => x.clone(),
        };
        Factors { bt: scale(&self.bt, rows), a: scale(&self.a, columns) }
    }

    /// The same product at a larger rank: zero rows are added to `Bᵀ` and A. A smaller `rank` changes nothing.
    pub fn padded(mut self, rank: usize) -> Factors {
        if rank > self.rank() {
            let (o, i) = self.size();
            self.bt.resize_with(rank, o, |_, _| 0.0);
            self.a.resize_with(rank, i, |_, _| 0.0);
        }
        self
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
    inputs: Vec<InputGram>,
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
        Ok(Batch { frame, stack, inputs: Vec::new() })
    }

    /// The same adapters with other factors of the same ranks and size.
    pub fn with_stack(&self, stack: Factors) -> Batch {
        Batch { frame: self.frame.clone(), stack, inputs: self.inputs.clone() }
    }

    /// The same updates with the Gram of each member's inputs.
    pub fn with_inputs(self, inputs: Vec<InputGram>) -> Batch {
        Batch { inputs, ..self }
    }

    /// The Gram of each member's inputs; fails where they are not known, naming `--grams`.
    pub fn inputs(&self) -> Result<&[InputGram]> {
        if self.inputs.len() == self.frame.edges() {
            return Ok(&self.inputs);
        }
        Err(Error::Usage(format!(
            "{}: {} input Grams for {} adapters, expected one each: give --grams DIR,… in the adapters' order",
            self.frame.module,
            self.inputs.len(),
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

    /// `Σₑ cₑ Bₑᵀ`, `[R, O]`; the ranks must be equal.
    pub fn sum_bt(&self, c: &[f64]) -> Mat<f64> {
        self.sum(self.stack.bt(), c)
    }

    /// `Σₑ cₑ Aₑ`, `[R, I]`; the ranks must be equal.
    pub fn sum_a(&self, c: &[f64]) -> Mat<f64> {
        self.sum(self.stack.a(), c)
    }

    fn sum(&self, x: MatRef<'_, f64>, c: &[f64]) -> Mat<f64> {
        let r = self.frame.block(0).len();
        let mut out = Mat::zeros(r, x.ncols());
        for (e, &c) in c.iter().enumerate() {
            zip!(&mut out, x.subrows(self.frame.block(e).start, r)).for_each(|unzip!(out, x)| *out += c * x);
        }
        out
    }
}
