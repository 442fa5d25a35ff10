//! How the factors of a fused update, as they are written, compare with what they should be.

use faer::{Mat, MatRef};

use crate::algebra::{gram, inner, product, pseudo_inverse};
use crate::error::Result;
use crate::fuse::factors::{Batch, Factors};
use crate::fuse::grams::Grams;
use crate::fuse::lora_cr::Resolution;

/// How a written update compares with what it should be.
#[derive(Clone, Debug)]
pub struct Measured {
    /// `‖got − expected‖ / ‖expected‖`.
    pub error: f64,
    /// `‖got − Σ wᵢDᵢ‖ / ‖Σ wᵢDᵢ‖`.
    pub distance_to_mean: f64,
    /// The least-squares share of each update as read.
    pub effective_scale: Vec<f64>,
}

/// Measures `got`, the factors as written, against the `expected` ones and the updates `inputs` with Grams `grams`.
///
/// `resolution` is what was done to the updates before they were fused. The difference to `expected` is taken factor by
/// factor, `δB A + B δA`, so that it is exact however small; the distance to the mean comes from Grams and cannot tell
/// less than about 1e-8 from 0.
pub fn measure(
    got: &Factors,
    expected: &Factors,
    inputs: &Batch,
    grams: &Grams,
    resolution: Option<&Resolution>,
) -> Result<Measured> {
    let size = norm_squared(got.bt(), got.a());
    let error = ratio(difference_squared(got, expected), norm_squared(expected.bt(), expected.a()), size);

    let (gb, ga) = (product(got.bt(), inputs.stack.b()), product(got.a(), inputs.stack.a().transpose()));
    let along = along(inputs, gb.as_ref(), ga.as_ref());
    let scale = product(pseudo_inverse(grams.products().as_ref())?.as_ref(), along.as_ref());

    let (products, along) = match resolution {
        None => (grams.products(), along),
        Some(r) => {
            let gb = r.left.as_ref().map_or_else(|| gb.clone(), |w| product(gb.as_ref(), w.as_ref()));
            let ga = r.right.as_ref().map_or_else(|| ga.clone(), |w| product(ga.as_ref(), w.transpose()));
            (r.grams(grams).products(), self::along(inputs, gb.as_ref(), ga.as_ref()))
        }
    };
    let w = mean_weights(&inputs.frame.weights);
    let w = Mat::from_fn(w.len(), 1, |e, _| w[e]);
    let mean = product(w.transpose(), product(products.as_ref(), w.as_ref()).as_ref())[(0, 0)];
    let cross = product(w.transpose(), along.as_ref())[(0, 0)];
    Ok(Measured {
        error,
        distance_to_mean: ratio(size - 2.0 * cross + mean, mean, size),
        effective_scale: (0..inputs.frame.edges()).map(|e| scale[(e, 0)]).collect(),
    })
}

/// Weights that add up to 1, as those of a mean do; equal ones where the sum is not positive.
fn mean_weights(weights: &[f64]) -> Vec<f64> {
    let sum: f64 = weights.iter().sum();
    if sum > 0.0 {
        weights.iter().map(|w| w / sum).collect()
    } else {
        vec![1.0 / weights.len() as f64; weights.len()]
    }
}

/// `⟨got, Dₑ⟩` for each e, `[E, 1]`, from `gb = Bᵀ [B₁ …]` and `ga = A [A₁; …]ᵀ`, both `[R, P]`.
fn along(inputs: &Batch, gb: MatRef<'_, f64>, ga: MatRef<'_, f64>) -> Mat<f64> {
    Mat::from_fn(inputs.frame.edges(), 1, |e, _| {
        let at = inputs.frame.block(e);
        inner(gb.subcols(at.start, at.len()), ga.subcols(at.start, at.len()))
    })
}

/// `‖B A‖²` from `Bᵀ` and A.
pub(super) fn norm_squared(bt: MatRef<'_, f64>, a: MatRef<'_, f64>) -> f64 {
    inner(gram(bt).as_ref(), gram(a).as_ref()).max(0.0)
}

/// `‖B A − B' A'‖²` as `‖[B − B', B'] [A; A − A']‖²`; missing rows of the smaller rank are zero.
fn difference_squared(got: &Factors, expected: &Factors) -> f64 {
    let r = got.rank().max(expected.rank());
    let at = |x: MatRef<'_, f64>, k: usize, j: usize| if k < x.nrows() { x[(k, j)] } else { 0.0 };
    let bt = Mat::from_fn(2 * r, got.bt().ncols(), |k, j| match k.checked_sub(r) {
        None => at(got.bt(), k, j) - at(expected.bt(), k, j),
        Some(k) => at(expected.bt(), k, j),
    });
    let a = Mat::from_fn(2 * r, got.a().ncols(), |k, j| match k.checked_sub(r) {
        None => at(got.a(), k, j),
        Some(k) => at(got.a(), k, j) - at(expected.a(), k, j),
    });
    norm_squared(bt.as_ref(), a.as_ref())
}

/// `√(difference / reference)`, or `√size` where the reference is 0.
fn ratio(difference: f64, reference: f64, size: f64) -> f64 {
    if reference > 0.0 { (difference.max(0.0) / reference).sqrt() } else { size.sqrt() }
}
