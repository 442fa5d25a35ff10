//! Buffers of random numbers: a few, again and again.

use std::sync::{Arc, LazyLock};

use anabranch::Result;
use anabranch::backend::Backend;
use anabranch::host::MatrixSource;
use anabranch::random::{Philox, Purpose};
use anabranch::tensor::{Elem, MemoryLayout, Real, Store};
use half::bf16;

/// In −1 … 1; a prime number of them, so that no two rows are alike.
static NUMBERS: LazyLock<Vec<f32>> = LazyLock::new(|| {
    let random = Philox::new(1, Purpose::Test.stream(0));
    (0..1_048_573u64).map(|i| 2.0 * random.uniform(i) - 1.0).collect()
});

/// `n` numbers, others for another `from`.
fn numbers<T>(from: usize, n: usize, f: impl Fn(f32) -> T) -> Vec<T> {
    NUMBERS.iter().cycle().skip(7919 * from % NUMBERS.len()).take(n).map(|&x| f(x)).collect()
}

/// A buffer that holds `values`.
pub fn buffer<B: Backend, E: Elem>(backend: &B, values: &[E]) -> Result<<B::Store as Store>::Buf<E>> {
    let mut buffer = backend.alloc("numbers", values.len())?;
    backend.upload(B::Store::view_mut(&mut buffer, 0..values.len()), values)?;
    Ok(buffer)
}

/// `[rows, width]` of activations.
pub fn rows<B: Backend, T: Real>(
    backend: &B,
    from: usize,
    rows: usize,
    width: usize,
) -> Result<<B::Store as Store>::Buf<T>> {
    buffer(backend, &numbers(from, rows * B::Store::row(width), T::from_f32))
}

/// `[n]`.
pub fn vector<B: Backend>(backend: &B, from: usize, n: usize) -> Result<<B::Store as Store>::Buf<f32>> {
    buffer(backend, &numbers(from, n, |x| x))
}

/// `[n]` in f64.
pub fn doubles<B: Backend>(backend: &B, from: usize, n: usize) -> Result<<B::Store as Store>::Buf<f64>> {
    buffer(backend, &numbers(from, n, f64::from))
}

/// `W[O, I]` in bf16, as of a model: its products are about as large as what it is multiplied with.
pub fn matrix<B: Backend>(backend: &B, (o, i): (usize, usize)) -> Result<<B::Store as Store>::Matrix> {
    let scale = 1.0 / (i as f32).sqrt();
    let bytes = bytemuck::cast_slice::<bf16, u8>(&numbers(o, o * i, |x| bf16::from_f32(scale * x))).to_vec();
    let range = 0..bytes.len();
    let source =
        MatrixSource { name: "W".into(), bytes: Arc::new(bytes), range, dtype: bf16::DTYPE, size: (o, i) };
    backend.matrix(source)
}

/// Copies `bytes` bytes on the device.
pub fn copy<B: Backend>(backend: &B, bytes: usize) -> Result<impl FnMut() -> Result<()> + '_> {
    let from = buffer(backend, &vec![1u8; bytes])?;
    let mut to = backend.alloc::<u8>("a copy", bytes)?;
    Ok(move || backend.copy(B::Store::view_mut(&mut to, 0..bytes), B::Store::view(&from, 0..bytes)))
}

/// The median; none of nothing.
pub fn median(mut times: Vec<f64>) -> Option<f64> {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied()
}
