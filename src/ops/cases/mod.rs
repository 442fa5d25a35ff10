//! What tests of operations share: random operands, guarded outputs, tolerances, thread counts.

pub mod adamw;
pub mod device;
pub mod embed;
pub mod linear;
pub mod rms_norm;
pub mod rope;
pub mod sum_sq;
pub mod swiglu;

use std::fmt::Debug;

use rayon::ThreadPoolBuilder;

use crate::random::{Philox, Purpose};
use crate::tensor::{Elem, Real};

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

const ZONE: usize = 64;

/// An output between two zones that must not be written.
pub struct Guarded<T> {
    all: Vec<T>,
    zone: T,
}

impl<T: Elem> Guarded<T> {
    /// `content` between two zones filled with `zone`.
    pub fn new(content: &[T], zone: T) -> Guarded<T> {
        let mut all = vec![zone; content.len() + 2 * ZONE];
        all[ZONE..ZONE + content.len()].copy_from_slice(content);
        Guarded { all, zone }
    }

    /// The part to write.
    pub fn out(&mut self) -> &mut [T] {
        let end = self.all.len() - ZONE;
        &mut self.all[ZONE..end]
    }

    /// What was written, if the zones are whole.
    pub fn done(self) -> Vec<T> {
        let end = self.all.len() - ZONE;
        let whole = |zone: &[T]| zone.iter().all(|x| bytemuck::bytes_of(x) == bytemuck::bytes_of(&self.zone));
        assert!(whole(&self.all[..ZONE]) && whole(&self.all[end..]), "written outside of the output");
        self.all[ZONE..end].to_vec()
    }
}

/// `n` times NaN between guard zones.
pub fn unwritten<T: Real>(n: usize) -> Guarded<T> {
    Guarded::new(&vec![T::from_f32(f32::NAN); n], T::from_f32(-77.0))
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

/// Runs `f` twice and on 1, 2 and 3 threads; all results must be the same bytes. Returns one.
pub fn same_on_threads<R: PartialEq + Debug + Send>(f: impl Fn() -> R + Sync) -> R {
    let on = |threads: usize| {
        let pool = ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
        pool.install(&f)
    };
    let one = on(1);
    for threads in [1, 2, 3] {
        assert!(on(threads) == one, "another result on {threads} threads");
    }
    one
}

/// The bits of `x`, for comparisons that tell 0 from −0.
pub fn bits<T: Real>(x: &[T]) -> Vec<u32> {
    x.iter().map(|x| x.to_f32().to_bits()).collect()
}
