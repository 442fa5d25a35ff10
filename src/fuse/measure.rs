//! How the factors of a fused update, as they are written, compare with what they should be.

use faer::{Mat, MatMut, MatRef};

use crate::algebra::difference::Difference;
use crate::algebra::{Spread, gram, inner, mirrored, product, pseudo_inverse, slice};
use crate::checkpoint::adapter_writer::pad_rows;
use crate::cpu::simd::{Isa, Kernel, run};
use crate::error::Result;
use crate::fuse::compare::Compared;
use crate::fuse::factors::{Batch, Factors, Rows};
use crate::fuse::linear::{Linear, Made};

/// Columns of a factor that are compared at once: with as many ranks as eight adapters have they stay in the second cache.
const PANEL: usize = 512;
/// Columns for each rank of a map that are compared at once: fewer do not pay for packing it.
const COLUMNS: usize = 4;
/// Columns of a factor that all threads compare at once.
const WIDE: usize = 4096;
/// How far a row's squared norm may be from what the Grams say of it.
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

/// Measures `got`, the factors as written, against the expected ones and the updates `inputs`, of which `compared` is
/// known.
///
/// The difference to the expected ones is taken factor by factor, `δB A + B δA`, so that it is exact however small; the
/// distance to the mean comes from Grams and cannot tell less than a few 1e-8 from 0.
pub fn measure(got: &Factors, expected: &Made, inputs: &Batch, compared: &Compared) -> Result<Measured> {
    let copy = |x: &Rows, first: usize, out: &mut [f64]| {
        out.copy_from_slice(&x.numbers()[first * x.rank()..][..out.len()]);
    };
    let own = Measuring { made: expected, inputs, compared, rank: got.rank() };
    own.measure(
        |first, _, out| copy(got.rows_bt(), first, out),
        |first, _, out| copy(got.rows_a(), first, out),
    )
}

/// What is measured, but for the factors as written.
pub(super) struct Measuring<'a> {
    /// What is expected.
    pub made: &'a Made,
    /// The updates as read.
    pub inputs: &'a Batch,
    /// What is known of them.
    pub compared: &'a Compared,
    /// The rank of what was written.
    pub rank: usize,
}

impl Measuring<'_> {
    /// [`measure`] of `Bᵀ` and A a few columns at a time, column after column: each is told the first column and what is
    /// expected there, and puts what was written where it is told; some columns are asked for twice.
    pub(super) fn measure(
        &self,
        bt: impl FnMut(usize, &[f64], &mut [f64]),
        a: impl FnMut(usize, &[f64], &mut [f64]),
    ) -> Result<Measured> {
        let Measuring { made, inputs, compared, .. } = self;
        let (grams, resolved) = (compared.grams.as_ref(), compared.resolved_factors());
        let expected: [Expected<'_>; 2] = match made {
            Made::Factors(factors) => [Expected::Factor(factors.bt()), Expected::Factor(factors.a())],
            Made::Pair(pair) => [Expected::Linear(&pair.bt), Expected::Linear(&pair.a)],
        };
        let [of_b, of_a] = expected;
        let half = |expected, stack, gram, resolved| Half {
            expected,
            stack,
            gram,
            resolved,
            rank: self.rank,
            spread: inputs.frame.spread(),
        };
        let stack = &inputs.stack;
        let b = half(of_b, stack.bt(), grams.map(|g| g.b.as_ref()), resolved.map(|f| f.bt())).sums(bt);
        let a = half(of_a, stack.a(), grams.map(|g| g.a.as_ref()), resolved.map(|f| f.a())).sums(a);
        let size = inner(b.change.got().as_ref(), a.change.got().as_ref()).max(0.0);
        let expected = inner(b.change.was.as_ref(), a.change.was.as_ref()).max(0.0);
        let error = ratio(difference_squared(&b.change, &a.change), expected, size);
        let along = |b: &Mat<f64>, a: &Mat<f64>| along(inputs, b.as_ref(), a.as_ref());
        let read = along(&b.with, &a.with);
        let by_maps = compared.with_resolved(&b.with, &a.with, inputs.frame.spread());
        let fused = match (b.with_resolved.zip(a.with_resolved), by_maps) {
            (Some((b, a)), _) | (None, Some((b, a))) => along(&b, &a),
            (None, None) => read.clone(),
        };
        Measured::new(error, size, &read, &fused, &inputs.frame.weights, compared)
    }
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
    /// `(x + δ)(x + δ)ᵀ`.
    fn got(&self) -> Mat<f64> {
        match &self.by {
            None => self.was.clone(),
            Some((cross, square)) => &self.was + cross + cross.transpose() + square,
        }
    }
}

/// What a factor should be.
enum Expected<'a> {
    /// This.
    Factor(MatRef<'a, f64>),
    /// What this makes of the stacked one.
    Linear(&'a Linear),
}

/// A factor `[K, n]`, but for what was written, beside what it is made of.
struct Half<'a> {
    expected: Expected<'a>,
    /// `[P, n]`.
    stack: MatRef<'a, f64>,
    /// `stack stackᵀ`, where it is known.
    gram: Option<MatRef<'a, f64>>,
    /// `[P, n]`: the resolved stack, where it is no map of the one that was read.
    resolved: Option<MatRef<'a, f64>>,
    /// The rank of what was written.
    rank: usize,
    spread: Spread,
}

/// All that norms and inner products need of a factor.
struct Sums {
    change: Change,
    /// `got stackᵀ`, `[K, P]`.
    with: Mat<f64>,
    /// `got resolvedᵀ`.
    with_resolved: Option<Mat<f64>>,
}

/// The columns of a factor from one on.
struct Columns<'a> {
    stack: MatRef<'a, f64>,
    first: usize,
    expected: MatRef<'a, f64>,
    /// `got − expected`; none where there is no change.
    delta: Option<MatRef<'a, f64>>,
}

impl Half<'_> {
    fn sums(&self, mut got: impl FnMut(usize, &[f64], &mut [f64])) -> Sums {
        self.known(&mut got).unwrap_or_else(|| self.summed(&mut got))
    }

    /// What is linear in the stack, and what it has with the stack, is as linear in the Gram; none where the norm of a row
    /// is not what the Gram says of it, be it for rounding, or nothing is known.
    fn known(&self, got: &mut impl FnMut(usize, &[f64], &mut [f64])) -> Option<Sums> {
        let (Expected::Linear(linear), Some(gram), None) = (&self.expected, self.gram, self.resolved) else {
            return None;
        };
        let (p, spread) = (self.stack.nrows(), self.spread);
        let rank = linear.rank(p);
        if rank != self.rank {
            return None;
        }
        let turned =
            |x: &Mat<f64>| linear.of(x.transpose().to_owned().as_ref(), spread).transpose().to_owned();
        let mut with = linear.of(gram, spread);
        let was = turned(&with);
        let (mut own, mut change) = (vec![0.0; rank], None);
        self.panels(got, |Columns { stack, expected, delta, .. }| {
            run(AddSquares { sums: &mut own, x: expected });
            if let Some(delta) = delta {
                change.get_or_insert_with(|| Difference::new(rank, p)).add(delta, stack);
            }
        });
        if own.iter().enumerate().any(|(k, own)| (own - was[(k, k)]).abs() > TRUST * own) {
            return None;
        }
        let by = change.map(|change| {
            let (along, square) = change.sums();
            let cross = turned(&along);
            with += along;
            (cross, square)
        });
        Some(Sums { change: Change { was, by }, with, with_resolved: None })
    }

    /// Everything from the columns themselves. Missing rows of the smaller rank are zero.
    fn summed(&self, got: &mut impl FnMut(usize, &[f64], &mut [f64])) -> Sums {
        let (p, spread) = (self.stack.nrows(), self.spread);
        let rank = self.rank.max(self.expected_rank());
        let square = || Mat::<f64>::zeros(rank, rank);
        let (mut was, mut by, mut with) = (square(), None, Mat::zeros(rank, p));
        let mut with_resolved = self.resolved.map(|x| Mat::zeros(rank, x.nrows()));
        self.panels(got, |Columns { stack, first, expected, delta }| {
            spread.add_gram(was.as_mut(), expected);
            let mut add = |x: MatRef<'_, f64>| {
                spread.add_product(with.as_mut(), x, stack.transpose());
                if let (Some(sum), Some(resolved)) = (&mut with_resolved, self.resolved) {
                    let resolved = resolved.subcols(first, stack.ncols());
                    spread.add_product(sum.as_mut(), x, resolved.transpose());
                }
            };
            add(expected);
            if let Some(delta) = delta {
                let (cross, square) = by.get_or_insert_with(|| (square(), square()));
                spread.add_product(cross.as_mut(), delta, expected.transpose());
                spread.add_gram(square.as_mut(), delta);
                add(delta);
            }
        });
        let by = by.map(|(cross, square)| (cross, mirrored(square)));
        Sums { change: Change { was: mirrored(was), by }, with, with_resolved }
    }

    fn expected_rank(&self) -> usize {
        match self.expected {
            Expected::Factor(x) => x.nrows(),
            Expected::Linear(linear) => linear.rank(self.stack.nrows()),
        }
    }

    /// All columns, a few at a time: of what is expected and what was written no more is ever held.
    fn panels(&self, got: &mut impl FnMut(usize, &[f64], &mut [f64]), mut take: impl FnMut(Columns<'_>)) {
        let (n, own) = (self.stack.ncols(), self.expected_rank());
        let rank = self.rank.max(own);
        let at_once = match (self.spread, &self.expected) {
            (Spread::Pool, _) => WIDE,
            (_, Expected::Linear(Linear::Map(map))) => PANEL.max(COLUMNS * map.nrows().max(map.ncols())),
            _ => PANEL.max(self.stack.nrows()),
        };
        let (mut expected, mut written) =
            (vec![0.0; own * at_once.min(n)], vec![0.0; self.rank * at_once.min(n)]);
        for first in (0..n).step_by(at_once) {
            let some = at_once.min(n - first);
            let stack = self.stack.subcols(first, some);
            let (expected, written) = (&mut expected[..own * some], &mut written[..self.rank * some]);
            let columns = MatMut::from_column_major_slice_mut(expected, own, some);
            match self.expected {
                Expected::Factor(x) => { columns }.copy_from(x.subcols(first, some)),
                Expected::Linear(linear) => linear.put(columns, stack, self.spread),
            }
            got(first, expected, written);
            let mut padded = [Vec::new(), Vec::new()];
            if self.rank != own {
                let pad = |x: &[f64], from: usize| pad_rows(x.to_vec(), from, rank);
                padded = [pad(expected, own), pad(written, self.rank)];
            }
            let [of_expected, of_written] = &mut padded;
            let (expected, written) = match self.rank == own {
                true => (expected, written),
                false => (&mut of_expected[..], &mut of_written[..]),
            };
            let changed = run(Subtract { x: written, y: expected });
            let columns = |x| MatRef::from_column_major_slice(x, rank, some);
            let delta = changed.then(|| columns(&*written));
            take(Columns { stack, first, expected: columns(&*expected), delta });
        }
    }
}

/// Adds the squares of each row.
struct AddSquares<'a> {
    sums: &'a mut [f64],
    x: MatRef<'a, f64>,
}

impl Kernel for AddSquares<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        for k in 0..self.x.ncols() {
            self.sums.iter_mut().zip(slice(self.x, k)).for_each(|(sum, x)| *sum += x * x);
        }
    }
}

/// `x −= y`, and whether anything is left.
struct Subtract<'a> {
    x: &'a mut [f64],
    y: &'a [f64],
}

impl Kernel for Subtract<'_> {
    type Output = bool;

    #[inline(always)]
    fn run<I: Isa>(self) -> bool {
        let subtract = |changed, (x, y): (&mut f64, &f64)| {
            *x -= y;
            changed | (*x != 0.0)
        };
        self.x.iter_mut().zip(self.y).fold(false, subtract)
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
