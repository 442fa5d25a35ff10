//! Cases of [`crate::ops::rsvd`].

use std::sync::Arc;

use half::bf16;

use super::device::{holding, same_on};
use super::{close64, normal, normal64};
use crate::backend::Backend;
use crate::host::{Host, HostMatrix, MatrixSource};
use crate::ops::rsvd::{Rsvd, Sketch, reference};
use crate::tensor::{DType, Store};

/// What was found for one matrix, row by row.
pub struct Found<'a> {
    /// `[k]`.
    pub values: &'a [f64],
    /// `[k]`.
    pub residuals: &'a [f64],
    /// `‖A‖²`.
    pub energy: f64,
    /// `[O, k]`.
    pub u: &'a [f64],
    /// `[I, k]`.
    pub v: &'a [f64],
}

/// Column `j` of `x[n, k]`.
fn column(x: &[f64], k: usize, j: usize) -> Vec<f64> {
    x.iter().skip(j).step_by(k).copied().collect()
}

fn dot(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

fn norm(x: impl Iterator<Item = f64>) -> f64 {
    x.map(|x| x * x).sum::<f64>().sqrt()
}

/// Fails unless the vectors are orthonormal, `A v = σ u`, and residuals and energy are those of `a[O, I]`, all in f64.
pub fn check(what: &str, a: &[f64], inner: usize, found: &Found<'_>) {
    let Found { values, residuals, energy, u, v } = found;
    let (k, size) = (values.len(), values[0]);
    assert!(values.windows(2).all(|w| w[0] >= w[1]), "{what}: {values:?}");
    let exact = dot(a, a);
    assert!((energy - exact).abs() <= 1e-6 * exact, "{what}: energy {energy}, expected {exact}");
    for j in 0..k {
        let (left, right) = (column(u, k, j), column(v, k, j));
        if values[j] == 0.0 {
            assert!(
                left.iter().chain(&right).all(|x| *x == 0.0) && residuals[j] == 0.0,
                "{what}: direction {j}"
            );
            continue;
        }
        for n in 0..=j {
            // Values that f32 hardly tells from nothing have vectors that it hardly tells from others.
            let tol = 1e-6 + 1e-6 * size / values[j];
            for (x, all) in [(&left, u), (&right, v)] {
                let product = dot(x, &column(all, k, n)) - f64::from(u8::from(n == j));
                assert!(product.abs() <= tol, "{what}: vectors {j} and {n}: {product:e}");
            }
        }
        let largest = left.iter().fold(0.0f64, |m, x| if x.abs() > m.abs() { *x } else { m });
        assert!(largest > 0.0, "{what}: the sign of direction {j}");
        let forth = a.chunks(inner).zip(&left).map(|(a, u)| dot(a, &right) - values[j] * u);
        let forth = norm(forth);
        assert!(forth <= 4e-6 * size, "{what}: A v = σ u of direction {j}: off by {forth:e} of {size:e}");
        let mut down: Vec<f64> = right.iter().map(|v| -values[j] * v).collect();
        for (a, u) in a.chunks(inner).zip(&left) {
            a.iter().zip(&mut down).for_each(|(a, down)| *down += a * u);
        }
        let missing = norm(down.into_iter());
        let tol = 1e-5 * missing + 4e-6 * size * size / values[j];
        let off = (missing - residuals[j]).abs();
        assert!(off <= tol, "{what}: residual {j} is {:e}, expected {missing:e}", residuals[j]);
    }
}

/// A weight `[o, i]` in bf16, and how it is made.
fn weight(seed: u64, kind: &str, (o, i): (usize, usize)) -> Vec<bf16> {
    // Small whole numbers, so that their products' sums are exact in bf16.
    let whole = |seed, n| normal64(seed, n, 1.2).into_iter().map(|x| x.round().clamp(-4.0, 4.0));
    match kind {
        "flat" => normal(seed, o * i, 0.02),
        "steep" => {
            let x = normal64(seed, o * i, 1.0);
            let at = |n: usize| bf16::from_f64(x[n] * 0.7_f64.powi((n % i) as i32));
            (0..o * i).map(at).collect()
        }
        "rank 2" => {
            let (b, a): (Vec<_>, Vec<_>) = (whole(seed, 2 * o).collect(), whole(seed + 1, 2 * i).collect());
            let at = |n: usize| bf16::from_f64(b[n / i] * a[n % i] + b[o + n / i] * a[i + n % i]);
            (0..o * i).map(at).collect()
        }
        "zero" => vec![bf16::ZERO; o * i],
        _ => {
            let mut x: Vec<bf16> = normal(seed, o * i, 1.0);
            x[o * i - 1] = if kind == "NaN" { bf16::NAN } else { bf16::NEG_INFINITY };
            x
        }
    }
}

fn source(weight: &[bf16], size: (usize, usize)) -> MatrixSource {
    let bytes: Vec<u8> = bytemuck::cast_slice(weight).to_vec();
    let range = 0..bytes.len();
    MatrixSource { name: "w".into(), bytes: Arc::new(bytes), range, dtype: DType::BF16, size }
}

/// values, residuals, energy, u, v.
type Results = [Vec<f64>; 5];

fn op<'a, S: Store>(
    (values, residuals, energy): (S::ViewMut<'a, f64>, S::ViewMut<'a, f64>, S::ViewMut<'a, f64>),
    vectors: Option<(S::ViewMut<'a, f64>, S::ViewMut<'a, f64>)>,
    scratch: S::ViewMut<'a, f32>,
    a: &'a [&'a S::Matrix],
    tensors: &'a [u64],
    sketch: Sketch,
) -> Rsvd<'a, S> {
    Rsvd { values, residuals, energy, vectors, scratch, a, tensors, sketch }
}

fn found<B: Backend>(
    backend: &B,
    weights: &[Vec<bf16>],
    size: (usize, usize),
    sketch: Sketch,
    vectors: bool,
) -> Results {
    let k = sketch.values(size);
    let n = weights.len();
    let a: Vec<_> = weights.iter().map(|w| backend.matrix(source(w, size)).expect("a weight")).collect();
    let a: Vec<_> = a.iter().collect();
    let tensors: Vec<u64> = (0..n as u64).map(|t| 3 * t + 1).collect();
    let scratch = vec![f32::NAN; backend.rsvd_scratch(n, size, &sketch)];
    let mut scratch = holding(backend, &scratch, -77.0);
    let outputs = [n * k, n * k, n, n * size.0 * k, n * size.1 * k];
    let mut outputs = outputs.map(|len| holding(backend, &vec![f64::NAN; len], -77.0));
    let [values, residuals, energy, u, v] = &mut outputs;
    let vectors = vectors.then(|| (u.view_mut(), v.view_mut()));
    let views = (values.view_mut(), residuals.view_mut(), energy.view_mut());
    backend.rsvd(op(views, vectors, scratch.view_mut(), &a, &tensors, sketch)).expect("rsvd");
    scratch.done(backend);
    outputs.map(|output| output.done(backend))
}

/// One weight and several in one launch, of all shapes and kinds.
pub fn conforms<B: Backend>(backends: &[B]) {
    let small = Sketch { oversample: 3, ..Sketch::new(4, 11) };
    let cases: [(&[&str], (usize, usize), Sketch); 11] = [
        (&["flat"], (1, 1), small),
        (&["flat"], (1, 50), small),
        (&["steep", "zero"], (50, 1), small),
        (&["flat", "rank 2", "zero", "steep", "NaN", "infinity", "rank 2"], (37, 29), small),
        (&["steep", "flat"], (129, 70), Sketch { iterations: 0, ..small }),
        (&["flat"], (515, 65), Sketch { iterations: 1, ..small }),
        (&["steep"], (64, 257), Sketch { iterations: 4, ..small }),
        (&["flat", "flat"], (5, 130), Sketch::new(9, 0)),
        (&["steep"], (40, 33), Sketch { oversample: 0, ..small }),
        (&["flat"], (90, 100), Sketch { oversample: 10, ..Sketch::new(60, 1) }),
        (&[], (0, 0), small),
    ];
    for (kinds, size, sketch) in cases {
        let weights: Vec<_> = kinds.iter().zip(5..).map(|(kind, seed)| weight(seed, kind, size)).collect();
        let want = wanted(&weights, size, sketch);
        let got = same_on(backends, |b| {
            // As bits, so that NaN equals itself.
            found(b, &weights, size, sketch, true)
                .map(|x| x.into_iter().map(f64::to_bits).collect::<Vec<_>>())
        });
        let got = got.map(|x| x.into_iter().map(f64::from_bits).collect::<Vec<_>>());
        let k = sketch.values(size);
        for (n, kind) in kinds.iter().enumerate() {
            let what = format!("{kind} {size:?}, {sketch:?}");
            let part = |x: &[f64], len: usize| x[n * len..(n + 1) * len].to_vec();
            let lens = [k, k, 1, size.0 * k, size.1 * k];
            let own: [Vec<f64>; 5] = std::array::from_fn(|x| part(&got[x], lens[x]));
            if matches!(*kind, "NaN" | "infinity") {
                assert!(own[..2].iter().chain(&own[3..]).flatten().all(|x| x.is_nan()), "{what}");
                assert!(!own[2][0].is_finite(), "{what}: {}", own[2][0]);
                continue;
            }
            let a: Vec<f64> = weights[n].iter().map(|x| x.to_f64()).collect();
            let [values, residuals, energy, u, v] = &own;
            check(&what, &a, size.1, &Found { values, residuals, energy: energy[0], u, v });
            let want: [Vec<f64>; 2] = std::array::from_fn(|x| part(&want[x], k));
            close64(&format!("values of {what}"), values, &want[0], 0.0, 2e-5 * want[0][0]);
            // As [`check`] allows for values that are small.
            close64(&format!("residuals of {what}"), residuals, &want[1], 1e-2, 1e-3 * want[0][0]);
        }
        if kinds.len() == 2 {
            let without = found(&backends[0], &weights, size, sketch, false);
            assert!(without[..3] == got[..3] && without[3..].iter().flatten().all(|x| x.is_nan()));
        }
    }
    refused(&backends[0]);
}

/// What the definition says.
fn wanted(weights: &[Vec<bf16>], size: (usize, usize), sketch: Sketch) -> [Vec<f64>; 2] {
    let a: Vec<_> = weights.iter().map(|w| HostMatrix::new(source(w, size)).expect("a weight")).collect();
    let a: Vec<_> = a.iter().collect();
    let (n, k) = (a.len(), sketch.values(size));
    let tensors: Vec<u64> = (0..n as u64).map(|t| 3 * t + 1).collect();
    let (mut values, mut residuals, mut energy) = (vec![0.0; n * k], vec![0.0; n * k], vec![0.0; n]);
    let views = (&mut values[..], &mut residuals[..], &mut energy[..]);
    reference(op::<Host>(views, None, &mut [][..], &a, &tensors, sketch)).expect("reference");
    [values, residuals]
}

/// Sizes that do not fit, with the words for it.
fn refused<B: Backend>(backend: &B) {
    let w = backend.matrix(source(&[bf16::ONE; 6], (2, 3))).expect("a weight");
    let other = backend.matrix(source(&[bf16::ONE; 6], (3, 2))).expect("a weight");
    for (values, a, rank, why) in [
        (3, vec![&w], 2, "values holds 3 elements, expected weights × k = 1 × 2"),
        (4, vec![&w, &other], 2, "a weight is [3, 2], expected [2, 3] as the first"),
        (0, vec![&w], 0, "weights are [2, 3], 0 values are asked for"),
    ] {
        let mut outputs = [values, values, a.len(), 0].map(|len| holding(backend, &vec![0.0; len], -77.0));
        let [values, residuals, energy, _] = &mut outputs;
        let mut scratch = holding::<B, f32>(backend, &[], -77.0);
        let tensors = vec![0; a.len()];
        let views = (values.view_mut(), residuals.view_mut(), energy.view_mut());
        let op = op::<B::Store>(views, None, scratch.view_mut(), &a, &tensors, Sketch::new(rank, 0));
        let err = backend.rsvd(op).expect_err(why).to_string();
        assert!(err.contains(why), "{err}");
    }
}
