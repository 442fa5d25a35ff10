//! Test inputs, and outputs that notice what must not happen to them.

use std::ops::Range;
use std::sync::Arc;

use anabranch::cpu::Cpu;
use anabranch::host::{HostMatrix, MatrixSource};
use anabranch::random::{Philox, Purpose};
use anabranch::tensor::{DType, Elem, Real};
use half::{bf16, f16};

/// `n` numbers in (-1, 1), named by `stream`.
pub fn numbers(stream: u64, n: usize) -> Vec<f32> {
    let p = Philox::new(1, Purpose::Test.stream(stream));
    (0..n as u64).map(|i| 2.0 * p.uniform(i) - 1.0).collect()
}

/// The same, rounded to `T`.
pub fn reals<T: Real>(stream: u64, n: usize) -> Vec<T> {
    numbers(stream, n).into_iter().map(T::from_f32).collect()
}

/// Absolute values.
pub fn sizes<T: Real>(x: &[T]) -> Vec<T> {
    x.iter().map(|x| T::from_f32(x.to_f32().abs())).collect()
}

/// A frozen weight of `dtype` that holds `values`.
pub fn matrix(values: &[f32], size: (usize, usize), dtype: DType) -> HostMatrix {
    let bytes: Vec<u8> = match dtype {
        DType::F32 => bytemuck::cast_slice(values).to_vec(),
        DType::BF16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
        DType::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
    };
    let range = 0..bytes.len();
    HostMatrix::new(MatrixSource { name: "w".into(), bytes: Arc::new(bytes), range, dtype, size }).unwrap()
}

/// A buffer with a guard zone at each end.
pub struct Guarded<T> {
    all: Vec<T>,
    inside: Range<usize>,
    guard: T,
}

const ZONE: usize = 67;

impl<T: Elem> Guarded<T> {
    /// `values` between guards of `guard`.
    pub fn new(values: Vec<T>, guard: T) -> Guarded<T> {
        let inside = ZONE..ZONE + values.len();
        let mut all = vec![guard; ZONE];
        all.extend(values);
        all.extend([guard; ZONE]);
        Guarded { all, inside, guard }
    }

    /// What an operation may write.
    pub fn inside(&mut self) -> &mut [T] {
        &mut self.all[self.inside.clone()]
    }

    /// The values, once the guards are seen to be whole.
    pub fn take(self) -> Vec<T> {
        let same = |x: &T| bytemuck::bytes_of(x) == bytemuck::bytes_of(&self.guard);
        assert!(self.all[..self.inside.start].iter().all(same), "wrote before its view");
        assert!(self.all[self.inside.end..].iter().all(same), "wrote behind its view");
        self.all[self.inside].to_vec()
    }
}

/// `n` elements of NaN between guards.
pub fn unwritten<T: Real>(n: usize) -> Guarded<T> {
    Guarded::new(vec![T::from_f32(f32::NAN); n], T::from_f32(-77.0))
}

/// Scratch of `n` NaNs between guards.
pub fn scratch(n: usize) -> Guarded<f32> {
    unwritten(n)
}

/// Runs `f` on one, two and three threads; the bytes must be the same, and those of a second run too.
pub fn on_all_threads<R: PartialEq + std::fmt::Debug>(f: impl Fn(&Cpu) -> R) -> R {
    let first = f(&Cpu::new(1).unwrap());
    for threads in [1, 2, 3] {
        let again = f(&Cpu::new(threads).unwrap());
        assert!(again == first, "{threads} threads give other bytes");
    }
    first
}

/// Each of `got` is within its tolerance of `want`.
pub fn close(what: &str, got: &[f64], want: &[f64], tolerance: impl Fn(usize) -> f64) {
    assert_eq!(got.len(), want.len());
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let (err, tol) = ((g - w).abs(), tolerance(i));
        assert!(err <= tol, "{what}: element {i} is {g}, expected {w} within {tol}");
    }
}

/// As bytes, so that NaN equals itself and −0 differs from 0.
pub fn bytes<T: Elem>(x: &[T]) -> Vec<u8> {
    bytemuck::cast_slice(x).to_vec()
}

/// The elements of `bytes`.
pub fn elements<T: Elem>(bytes: &[u8]) -> Vec<T> {
    bytes.chunks(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect()
}

/// In f64.
pub fn wide<T: Real>(x: &[T]) -> Vec<f64> {
    x.iter().map(|x| f64::from(x.to_f32())).collect()
}

/// One unit in the last place of `T`, relative.
pub fn unit<T: Real>() -> f64 {
    match T::DTYPE {
        DType::F32 => 2f64.powi(-23),
        DType::BF16 => 2f64.powi(-7),
        DType::F16 => 2f64.powi(-10),
    }
}
