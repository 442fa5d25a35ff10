//! `knots-ties`: KnOTS (Stoica et al., *Model merging with SVD to tie the KnOTS*, ICLR 2025): TIES on the updates as
//! they look in the basis that they share.
//!
//! `[D₁ … D_E] = U S [V₁ … V_E]ᵀ`, which is LoRA-CR's first step; each update is then `S Vₑᵀ = Uᵀ Dₑ`, K × I, of which
//! the largest entries are kept; `ΔW = λ U M` with M the mean, place by place, of those whose sign is that of their
//! weighted sum. Singular values up to [`crate::ops::gate::SIGMA_CUT`] of the largest are zero, as in LoRA-CR.

use faer::{Mat, Scale};

use crate::algebra::product;
use crate::algebra::root::Root;
use crate::algebra::subspace::{Other, Shared};
use crate::error::Result;
use crate::fuse::factors::{Batch, Factors, Frame};
use crate::fuse::grams::Grams;
use crate::fuse::ties::Trim;
use crate::ops::gate::Rule;

/// Columns of the aligned updates that are elected at once.
const COLUMNS: usize = 256;
/// A sum up to this share of its terms' magnitudes is zero: updates that cancel do so up to rounding.
const ZERO_SUM: f64 = 1e-10;

/// `B = λ U`, `A = M`, of rank K, at most `min(P, O)`.
pub fn fuse(batch: &Batch, grams: &Grams, trim: &Trim, lambda: f64) -> Result<Factors> {
    let frame = &batch.frame;
    let (_, i) = frame.size;
    let spread = frame.spread();
    let all = Rule { top: usize::MAX, share: 0.0, opposition: false };
    let squares: Vec<f64> = (0..grams.rank()).map(|j| grams.a[(j, j)]).collect();
    let Some(root) = Root::of(grams.b.as_ref(), &squares, spread)? else {
        return Ok(Factors::zeros(1, frame.size));
    };
    let rows = Other::Gram(grams.a.as_ref());
    let Some(shared) = Shared::of(root.r.as_ref(), rows, grams.bounds(), all, spread)? else {
        return Ok(Factors::zeros(1, frame.size));
    };
    let k = shared.sigma.len();
    let basis = root.map(shared.vectors, spread);
    let mut u = spread.product(basis.transpose(), batch.stack.bt());
    // What a vector's sign is, is arbitrary; the sign of a zero sum is not. The largest entry decides.
    let flip: Vec<f64> = (0..k)
        .map(|k| {
            let largest = (0..u.ncols()).map(|o| u[(k, o)]);
            largest.fold(0.0_f64, |m, x| if x.abs() > m.abs() { x } else { m }).signum()
        })
        .collect();
    u = Mat::from_fn(k, u.ncols(), |k, o| flip[k] * u[(k, o)]);
    let coords = Mat::from_fn(k, frame.rank(), |k, p| flip[k] * shared.coords[(k, p)]);

    let aligned = |e: usize, first: usize, n: usize| {
        let at = frame.block(e);
        product(coords.subcols(at.start, at.len()), batch.a(e).subcols(first, n))
    };
    // The same tiles for the threshold and the election: the entry that sets it must be the same number in both.
    let tiles = || (0..i).step_by(COLUMNS).map(|first| (first, COLUMNS.min(i - first)));
    let least: Vec<f64> = (0..frame.edges())
        .map(|e| {
            let all = tiles().flat_map(|(first, n)| numbers(&aligned(e, first, n))).collect();
            threshold(all, kept(frame, e, k, trim))
        })
        .collect();
    let mut merged = Mat::zeros(k, i);
    for (first, n) in tiles() {
        let z: Vec<Mat<f64>> = (0..frame.edges()).map(|e| aligned(e, first, n)).collect();
        for x in 0..n {
            for k in 0..k {
                let entries = || {
                    let all = z.iter().zip(&least).zip(&frame.weights).map(|((z, t), w)| (z[(k, x)], t, w));
                    all.filter(|(z, t, _)| *z != 0.0 && z.abs() >= **t).map(|(z, _, w)| (z, *w))
                };
                let (sum, size) = entries().fold((0.0, 0.0), |s, (z, w)| (s.0 + w * z, s.1 + w * z.abs()));
                let sign = if sum < -ZERO_SUM * size { -1.0 } else { 1.0 };
                let agreeing = entries().filter(|(z, _)| z * sign > 0.0);
                let (sum, weight) = agreeing.fold((0.0, 0.0), |s, (z, w)| (s.0 + w * z, s.1 + w));
                merged[(k, first + x)] = if weight > 0.0 { sum / weight } else { 0.0 };
            }
        }
    }
    Factors::new(u * Scale(lambda), merged)
}

/// How many entries of update `e` are kept, of K × I or of the columns that its pruning left of that.
fn kept(frame: &Frame, e: usize, k: usize, trim: &Trim) -> usize {
    trim.rank(k as u64 * trim.along(&frame.kept[e].columns, frame.size.1)) as usize
}

/// The least magnitude among the `n` largest of `x`; entries of that magnitude are kept together.
fn threshold(x: Vec<f64>, n: usize) -> f64 {
    let mut x: Vec<f64> = x.into_iter().map(f64::abs).collect();
    let at = n.min(x.len()) - 1;
    *x.select_nth_unstable_by(at, |a, b| b.total_cmp(a)).1
}

/// The numbers of `x`, column after column.
fn numbers(x: &Mat<f64>) -> Vec<f64> {
    (0..x.ncols()).flat_map(|j| x.col_as_slice(j)).copied().collect()
}
