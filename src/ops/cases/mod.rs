//! What tests of operations share: random operands, tolerances, and the cases that all back ends run.

pub mod adamw;
pub mod apply;
pub mod attention;
pub mod choice;
pub mod cross_entropy;
pub mod device;
pub mod eigh;
pub mod embed;
pub mod gate;
pub mod gram;
pub mod importance;
pub mod linear;
pub mod merge;
pub mod rms_norm;
pub mod rope;
pub mod rsvd;
pub mod scatter;
pub mod sum_sq;

use crate::random::{Philox, Purpose};
use crate::tensor::Real;

/// `n` numbers of a normal distribution of standard deviation `std`, rounded to `T`.
pub fn normal<T: Real>(seed: u64, n: usize, std: f32) -> Vec<T> {
    let random = Philox::new(seed, Purpose::Test.stream(0));
    let number = |i: u64| {
        let radius = (-2.0 * (1.0 - random.uniform_f64(2 * i)).ln()).sqrt();
        radius * (std::f64::consts::TAU * random.uniform_f64(2 * i + 1)).cos()
    };
    (0..n as u64).map(|i| T::from_f32(number(i) as f32 * std)).collect()
}

/// Central differences of `f` at `x`.
pub fn differences(x: &[f64], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    let mut moved = x.to_vec();
    (0..x.len())
        .map(|i| {
            let h = 1e-5;
            moved[i] = x[i] + h;
            let up = f(&moved);
            moved[i] = x[i] - h;
            let down = f(&moved);
            moved[i] = x[i];
            (up - down) / (2.0 * h)
        })
        .collect()
}

/// Fails unless each element is within `relative · |want| + absolute`; NaN fails.
pub fn assert_close<T: Real>(what: &str, got: &[T], want: &[T], relative: f64, absolute: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let (got, want) = (f64::from(got.to_f32()), f64::from(want.to_f32()));
        let (err, tol) = ((got - want).abs(), relative * want.abs() + absolute);
        assert!(err <= tol, "{what}[{i}] = {got}, expected {want}: off by {err:e}, allowed {tol:e}");
    }
}

/// Half a unit in the last place of `T`, relative: what one rounding may change.
pub fn rounding<T: Real>() -> f64 {
    let one = T::from_f32(1.0).to_f32();
    let mut eps = 1f32;
    while T::round(one + eps) != one {
        eps /= 2.0;
    }
    f64::from(eps)
}

/// The bits of `x`, for comparisons that tell 0 from −0.
pub fn bits<T: Real>(x: &[T]) -> Vec<u32> {
    x.iter().map(|x| x.to_f32().to_bits()).collect()
}

/// `n` numbers of a normal distribution of standard deviation `std`.
pub fn normal64(seed: u64, n: usize, std: f64) -> Vec<f64> {
    normal::<f32>(seed, n, 1.0).into_iter().map(|x| f64::from(x) * std).collect()
}

/// Fails unless each element is within `relative · |want| + absolute`; NaN fails.
pub fn close64(what: &str, got: &[f64], want: &[f64], relative: f64, absolute: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let (err, tol) = ((got - want).abs(), relative * want.abs() + absolute);
        assert!(err <= tol, "{what}[{i}] = {got}, expected {want}: off by {err:e}, allowed {tol:e}");
    }
}
