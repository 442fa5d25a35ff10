//! The Gram matrices of inputs, `G = XᵀX / T`, from the triangles in their files: products with them, and their sum.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatRef, Par};

use crate::checkpoint::input_grams::InputGram;
use crate::fuse::spd::{Cholesky, Symmetric};

/// Rows of G that are widened at once.
const ROWS: usize = 64;

/// The Grams of one input of each adapter. Copies share them and the factor of their sum: q, k and v read one input, and
/// so do gate and up.
#[derive(Clone, Debug, Default)]
pub struct BlockInputs {
    grams: Vec<InputGram>,
    sum: Arc<Mutex<Option<Sum>>>,
}

/// `Σ cₑGₑ'` factored.
#[derive(Debug)]
struct Sum {
    c: Vec<f64>,
    off: f64,
    factor: Arc<Cholesky>,
}

impl From<Vec<InputGram>> for BlockInputs {
    fn from(grams: Vec<InputGram>) -> BlockInputs {
        BlockInputs { grams, sum: Arc::default() }
    }
}

impl BlockInputs {
    /// One an adapter.
    pub fn grams(&self) -> &[InputGram] {
        &self.grams
    }

    /// `Σ cₑGₑ'` factored, `G'` being G with what is off the diagonal times `off`; the last one is kept for those who
    /// share these Grams. None where the sum is not positive definite.
    pub fn factored(&self, c: &[f64], off: f64) -> Option<Arc<Cholesky>> {
        if let Some(sum) = self.last().as_ref().filter(|sum| sum.c == c && sum.off == off) {
            return Some(sum.factor.clone());
        }
        // It is as large as the new one. Unlocked meanwhile: all threads factor, and one that waits could not.
        *self.last() = None;
        let mut sum = Symmetric::zeros(self.grams.first().map_or(0, InputGram::full));
        self.grams.iter().zip(c).for_each(|(gram, c)| add(&mut sum, gram, *c, off));
        let factor = Arc::new(sum.cholesky()?);
        *self.last() = Some(Sum { c: c.to_vec(), off, factor: factor.clone() });
        Some(factor)
    }

    fn last(&self) -> MutexGuard<'_, Option<Sum>> {
        // What is in it was put there whole.
        self.sum.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `A G'`, `[R, I]`, of `A[R, I]`; `G'` is G with what is off the diagonal times `off`.
pub fn times(a: MatRef<'_, f64>, gram: &InputGram, off: f64) -> Mat<f64> {
    let own;
    let a = match gram.kept() {
        None => a,
        Some(kept) => {
            own = Mat::from_fn(a.nrows(), kept.len(), |r, k| a[(r, kept[k])]);
            own.as_ref()
        }
    };
    let (r, n) = (a.nrows(), gram.width());
    let mut out = Mat::zeros(r, n);
    let mut row = vec![0.0; n];
    for first in (0..n).step_by(ROWS) {
        let rows = ROWS.min(n - first);
        // Rows first.. of G from column `first` on, the square on the diagonal made whole.
        let mut panel = Mat::<f64>::zeros(rows, n - first);
        for k in 0..rows {
            gram.row(first + k, &mut row);
            for (j, g) in row[..n - first - k].iter().enumerate() {
                let g = if j == 0 { *g } else { off * g };
                panel[(k, k + j)] = g;
                if k + j < rows {
                    panel[(k + j, k)] = g;
                }
            }
        }
        let add = Accum::Add;
        let mut right = out.subcols_mut(first, n - first);
        matmul(&mut right, add, a.subcols(first, rows), panel.as_ref(), 1.0, Par::Seq);
        let mut here = out.subcols_mut(first, rows);
        let below = panel.subcols(rows, n - first - rows).transpose();
        matmul(&mut here, add, a.subcols(first + rows, n - first - rows), below, 1.0, Par::Seq);
    }
    match gram.kept() {
        None => out,
        Some(kept) => {
            let mut whole = Mat::zeros(r, gram.full());
            for (k, &i) in kept.iter().enumerate() {
                whole.col_as_slice_mut(i).copy_from_slice(out.col_as_slice(k));
            }
            whole
        }
    }
}

/// Adds `c G'` to `sum`.
fn add(sum: &mut Symmetric, gram: &InputGram, c: f64, off: f64) {
    let n = gram.width();
    let mut row = vec![0.0; n];
    for k in 0..n {
        gram.row(k, &mut row);
        let numbers = row[..n - k].iter().enumerate().map(|(j, g)| c * if j == 0 { *g } else { off * g });
        match gram.kept() {
            None => sum.add_column(k, (k..n).zip(numbers)),
            Some(kept) => sum.add_column(kept[k], kept[k..].iter().copied().zip(numbers)),
        }
    }
}
