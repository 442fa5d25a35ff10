//! Taylor importance: gradient × weight, reduced to rows and columns as it is made.

use std::ops::Range;

use super::{dot, ensure, holds, holds_rows, wide};
use crate::error::Result;
use crate::host::Host;
use crate::tensor::{Frozen, Real, Store};

/// What is summed over a row or a column. g is the gradient of the mean loss of the whole calibration set, F the mean
/// over samples of the squared gradient of each sample's own mean loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Score {
    /// `|w g|`.
    AbsFirst,
    /// `w g`.
    First,
    /// `w² F`.
    Second,
    /// `|w g − ½ w² F|`.
    AbsMix,
}

impl Score {
    /// Whether F is needed, which costs one product per sample.
    pub fn needs_second(self) -> bool {
        matches!(self, Score::Second | Score::AbsMix)
    }

    /// The score of a weight w whose gradient is g and whose F is f.
    #[inline(always)]
    pub fn of(self, w: f64, g: f64, f: f64) -> f64 {
        match self {
            Score::AbsFirst => (w * g).abs(),
            Score::First => w * g,
            Score::Second => w * w * f,
            Score::AbsMix => (w * g - 0.5 * w * w * f).abs(),
        }
    }
}

/// One calibration sample: its rows, and how many of its tokens are supervised.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Rows of dy and x.
    pub rows: Range<usize>,
    /// nⱼ.
    pub supervised: usize,
}

/// With `accⱼ = dYⱼᵀ Xⱼ` per sample j (dY of the mean loss over all n supervised tokens):
/// `g = Σⱼ accⱼ`, `F = (1/samples) Σⱼ (n/nⱼ)² accⱼ²`; for each score its sums over rows and over columns of W.
///
/// The whole calibration set is one batch; a gradient of the size of W never exists. W is rounded to `T` as in the
/// forward pass; g and F are f32 sums, scores and their sums f64.
pub struct Importance<'a, S: Store, T: Real> {
    /// `[scores, O]`, written.
    pub row_sums: S::ViewMut<'a, f64>,
    /// `[scores, I]`, written.
    pub col_sums: S::ViewMut<'a, f64>,
    /// Room of the size that the back end asks for.
    pub scratch: S::ViewMut<'a, f32>,
    /// `[T, O]`.
    pub dy: S::View<'a, T>,
    /// `[T, I]`.
    pub x: S::View<'a, T>,
    /// `W[O, I]`.
    pub w: &'a S::Matrix,
    /// The samples; samples without a supervised token are left out of F.
    pub samples: &'a [Sample],
    /// Which sums.
    pub scores: &'a [Score],
    /// T.
    pub tokens: usize,
}

impl<S: Store, T: Real> Importance<'_, S, T> {
    /// Compares the sizes; returns `(O, I)`.
    pub fn check(&self) -> Result<(usize, usize)> {
        const OP: &str = "importance";
        let (o, i) = self.w.size();
        let s = ("scores", self.scores.len());
        holds(OP, "row_sums", &self.row_sums, &[s, ("O", o)])?;
        holds(OP, "col_sums", &self.col_sums, &[s, ("I", i)])?;
        holds_rows::<S>(OP, "dy", &self.dy, &[("T", self.tokens)], &[("O", o)])?;
        holds_rows::<S>(OP, "x", &self.x, &[("T", self.tokens)], &[("I", i)])?;
        let inside = self.samples.iter().all(|s| s.rows.start <= s.rows.end && s.rows.end <= self.tokens);
        ensure(OP, inside, || format!("a sample lies beyond T = {}", self.tokens))?;
        Ok((o, i))
    }
}

/// The definition of [`Importance`].
pub fn reference<T: Real>(op: Importance<'_, Host, T>) -> Result<()> {
    let (o, i) = op.check()?;
    let Importance { row_sums, col_sums, dy, x, w, samples, scores, .. } = op;
    let (dy, x) = (wide(dy), wide(x));
    let total: usize = samples.iter().map(|s| s.supervised).sum();
    let counted = samples.iter().filter(|s| s.supervised > 0).count();
    row_sums.fill(0.0);
    col_sums.fill(0.0);
    let mut weights = vec![0f32; i];
    for row in 0..o {
        w.rows::<T>(&mut weights, row..row + 1);
        for (column, &w) in weights.iter().enumerate() {
            let (mut g, mut q) = (0f64, 0f64);
            for sample in samples {
                let acc = dot(sample.rows.clone().map(|t| (dy[t * o + row], x[t * i + column])));
                g += acc;
                if sample.supervised > 0 {
                    q += (total as f64 / sample.supervised as f64 * acc).powi(2);
                }
            }
            let f = q / counted.max(1) as f64;
            for (s, score) in scores.iter().enumerate() {
                let value = score.of(f64::from(w), g, f);
                row_sums[s * o + row] += value;
                col_sums[s * i + column] += value;
            }
        }
    }
    Ok(())
}
