//! How the factors of a fused update, as they are written, compare with what they should be.

use faer::{Mat, MatRef};

use crate::algebra::{Spread, gram, inner, mirrored, product, pseudo_inverse, symmetric_product};
use crate::error::Result;
use crate::fuse::compare::{Compared, Maps};
use crate::fuse::factors::{Batch, Factors};

/// Columns of a factor that are compared at once.
const PANEL: usize = 512;
/// How far a factor's squared norm may be from what its map says of it.
const TRUST: f64 = 1e-6;

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

/// Measures `got`, the factors as written, against the `expected` ones and the updates `inputs`, of which `compared` is
/// known; `maps` are what made the expected ones of those that are fused, where there are such.
///
/// The difference to `expected` is taken factor by factor, `δB A + B δA`, so that it is exact however small; the distance
/// to the mean comes from Grams and cannot tell less than a few 1e-8 from 0.
pub fn measure(
    got: &Factors,
    expected: &Factors,
    maps: Option<&Maps>,
    inputs: &Batch,
    compared: &Compared,
) -> Result<Measured> {
    let spread = inputs.frame.spread();
    let maps = maps.filter(|_| got.rank() == expected.rank()).and_then(|maps| compared.composed(maps));
    let known = maps.zip(compared.grams.as_ref()).and_then(|(maps, grams)| {
        let left = maps.left.as_ref().map(|w| w.as_ref().transpose());
        let right = maps.right.as_ref().map(Mat::as_ref);
        let b = Known { stack: inputs.stack.bt(), gram: grams.b.as_ref(), map: left };
        let a = Known { stack: inputs.stack.a(), gram: grams.a.as_ref(), map: right };
        b.change(got.bt(), expected.bt(), spread).zip(a.change(got.a(), expected.a(), spread))
    });
    let ((b, gb), (a, ga)) = match known {
        Some(known) => known,
        None => {
            let with = |got: MatRef<'_, f64>, stack: MatRef<'_, f64>| spread.product(got, stack.transpose());
            let b = Change::new(got.bt(), expected.bt(), spread);
            let a = Change::new(got.a(), expected.a(), spread);
            // The stacked A of a mean is the inputs' own.
            let ga = match expected.rows_a().is(inputs.stack.rows_a()) && a.by.is_none() {
                true => a.was.clone(),
                false => with(got.a(), inputs.stack.a()),
            };
            ((b, with(got.bt(), inputs.stack.bt())), (a, ga))
        }
    };
    let size = inner(b.got().as_ref(), a.got().as_ref()).max(0.0);
    let error = ratio(difference_squared(&b, &a), inner(b.was.as_ref(), a.was.as_ref()).max(0.0), size);
    let read = along(inputs, gb.as_ref(), ga.as_ref());
    let fused = compared.along_resolved(inputs, (got.bt(), got.a()), &gb, &ga);
    Measured::new(error, size, &read, fused.as_deref().unwrap_or(&read), &inputs.frame.weights, compared)
}

impl Measured {
    /// Of a result with this `error` and `size = ‖got‖²`, whose inner products with the updates are `read` and, with the
    /// resolved ones, `fused`; the updates count as `weights` say, and `compared` is known of them.
    pub fn new(
        error: f64,
        size: f64,
        read: &[f64],
        fused: &[f64],
        weights: &[f64],
        compared: &Compared,
    ) -> Result<Measured> {
        let column = |x: &[f64]| Mat::from_fn(x.len(), 1, |e, _| x[e]);
        let scale = product(pseudo_inverse(compared.products.as_ref())?.as_ref(), column(read).as_ref());
        let products = compared.resolved.as_ref().map_or(&compared.products, |r| &r.products);
        let w = column(&mean_weights(weights));
        let mean = product(w.transpose(), product(products.as_ref(), w.as_ref()).as_ref())[(0, 0)];
        let cross = product(w.transpose(), column(fused).as_ref())[(0, 0)];
        Ok(Measured {
            error,
            distance_to_mean: ratio(size - 2.0 * cross + mean, mean, size),
            effective_scale: (0..read.len()).map(|e| scale[(e, 0)]).collect(),
        })
    }
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

/// `⟨got, Dₑ⟩` for each e, from `gb = Bᵀ [B₁ …]` and `ga = A [A₁; …]ᵀ`, both `[R, P]`.
pub(super) fn along(inputs: &Batch, gb: MatRef<'_, f64>, ga: MatRef<'_, f64>) -> Vec<f64> {
    let one = |e| {
        let at = inputs.frame.block(e);
        inner(gb.subcols(at.start, at.len()), ga.subcols(at.start, at.len()))
    };
    (0..inputs.frame.edges()).map(one).collect()
}

/// `‖B A‖²` from `Bᵀ` and A.
pub(super) fn norm_squared(bt: MatRef<'_, f64>, a: MatRef<'_, f64>) -> f64 {
    inner(gram(bt).as_ref(), gram(a).as_ref()).max(0.0)
}

/// A factor x as it should be and as it was written, by Grams: all that norms of products need.
struct Change {
    /// `x xᵀ`, `[R, R]`.
    was: Mat<f64>,
    /// `δ xᵀ` and `δ δᵀ` of the change; none where there is none.
    by: Option<(Mat<f64>, Mat<f64>)>,
}

impl Change {
    /// Missing rows of the smaller rank are zero.
    fn new(got: MatRef<'_, f64>, expected: MatRef<'_, f64>, spread: Spread) -> Change {
        if got.nrows() != expected.nrows() {
            let rank = got.nrows().max(expected.nrows());
            let padded = |x: MatRef<'_, f64>| {
                Mat::from_fn(rank, x.ncols(), |k, j| if k < x.nrows() { x[(k, j)] } else { 0.0 })
            };
            return Change::new(padded(got).as_ref(), padded(expected).as_ref(), spread);
        }
        let rank = got.nrows();
        let zeros = || Mat::<f64>::zeros(rank, rank);
        let (mut was, mut by) = (zeros(), None);
        // A few columns at a time: of the change no more is ever held.
        for first in (0..got.ncols()).step_by(PANEL) {
            let width = PANEL.min(got.ncols() - first);
            let (got, expected) = (got.subcols(first, width), expected.subcols(first, width));
            spread.add_gram(was.as_mut(), expected);
            if got != expected {
                let (cross, square) = by.get_or_insert_with(|| (zeros(), zeros()));
                let delta = got - expected;
                spread.add_product(cross.as_mut(), delta.as_ref(), expected.transpose());
                spread.add_gram(square.as_mut(), delta.as_ref());
            }
        }
        Change { was: mirrored(was), by: by.map(|(cross, square)| (cross, mirrored(square))) }
    }

    /// `(x + δ)(x + δ)ᵀ`.
    fn got(&self) -> Mat<f64> {
        match &self.by {
            None => self.was.clone(),
            Some((cross, square)) => &self.was + cross + cross.transpose() + square,
        }
    }
}

/// The factor of a module as read, and what makes the expected one of it.
struct Known<'a> {
    /// `[P, n]`.
    stack: MatRef<'a, f64>,
    /// `stack stackᵀ`.
    gram: MatRef<'a, f64>,
    /// `[K, P]`: the expected factor is this times the stack; without one it is the stack.
    map: Option<MatRef<'a, f64>>,
}

impl Known<'_> {
    /// [`Change::new`] and `got stackᵀ`, `[K, P]`: what the map says of the expected factor is not summed again. None
    /// where the factor's own norm is not what the map says, be it for rounding.
    fn change(
        &self,
        got: MatRef<'_, f64>,
        expected: MatRef<'_, f64>,
        spread: Spread,
    ) -> Option<(Change, Mat<f64>)> {
        let (mut with, was) = match self.map {
            Some(map) => (product(map, self.gram), symmetric_product(expected, expected.transpose(), spread)),
            None => (self.gram.to_owned(), self.gram.to_owned()),
        };
        if let Some(map) = self.map {
            let (own, said) = (was.diagonal().column_vector().sum(), inner(with.as_ref(), map));
            if (own - said).abs() > TRUST * own {
                return None;
            }
        }
        if got == expected {
            return Some((Change { was, by: None }, with));
        }
        let rank = got.nrows();
        let (mut along, mut square) = (Mat::zeros(rank, self.stack.nrows()), Mat::zeros(rank, rank));
        for first in (0..got.ncols()).step_by(PANEL) {
            let some = PANEL.min(got.ncols() - first);
            let delta = got.subcols(first, some) - expected.subcols(first, some);
            let stack = self.stack.subcols(first, some);
            spread.add_product(along.as_mut(), delta.as_ref(), stack.transpose());
            spread.add_gram(square.as_mut(), delta.as_ref());
        }
        let cross = match self.map {
            Some(map) => product(along.as_ref(), map.transpose()),
            None => along.clone(),
        };
        with += along;
        Some((Change { was, by: Some((cross, mirrored(square))) }, with))
    }
}

/// `‖(B + δB)(A + δA) − B A‖² = ‖δB (A + δA) + B δA‖²`.
fn difference_squared(b: &Change, a: &Change) -> f64 {
    let left = b.by.as_ref().map_or(0.0, |(_, square)| inner(square.as_ref(), a.got().as_ref()));
    let right = a.by.as_ref().map_or(0.0, |(_, square)| inner(b.was.as_ref(), square.as_ref()));
    let both = match (&b.by, &a.by) {
        // ⟨δB (A + δA), B δA⟩ = ⟨δBᵀ B, (A + δA) δAᵀ⟩
        (Some((db, _)), Some((da, square))) => inner(db.as_ref(), (da.transpose() + square).as_ref()),
        _ => 0.0,
    };
    left + 2.0 * both + right
}

/// `√(difference / reference)`, or `√size` where the reference is 0.
pub(super) fn ratio(difference: f64, reference: f64, size: f64) -> f64 {
    if reference > 0.0 { (difference.max(0.0) / reference).sqrt() } else { size.sqrt() }
}
