//! What is done to whole weights: the search for singular values, and merging; of LLaMA-3-8B's shapes, in bf16.

use std::sync::Arc;

use anabranch::backend::{Backend, Scratch};
use anabranch::cpu::Cpu;
use anabranch::host::{HostMatrix, MatrixSource};
use anabranch::ops::merge::{Merge, Update};
use anabranch::ops::rsvd::{Rsvd, Sketch};
use anabranch::random::{Philox, Purpose};
use anabranch::tensor::Real;
use criterion::{Criterion, Throughput};
use half::bf16;

fn cpu() -> Cpu {
    Cpu::new(std::thread::available_parallelism().map_or(1, |n| n.get())).expect("threads")
}

fn numbers<T: Real>(stream: u64, n: usize) -> Vec<T> {
    let random = Philox::new(1, Purpose::Test.stream(stream));
    (0..n as u64).map(|i| T::from_f32(2.0 * random.uniform(i) - 1.0)).collect()
}

/// 16 values in three passes.
pub fn rsvd(c: &mut Criterion) {
    let cpu = cpu();
    let sketch = Sketch::new(16, 0);
    let mut group = c.benchmark_group("rsvd");
    group.sample_size(10);
    for size in [(4096, 4096), (14336, 4096), (4096, 14336)] {
        let bytes = bytemuck::cast_slice::<bf16, u8>(&numbers(1, size.0 * size.1)).to_vec();
        let range = 0..bytes.len();
        let source =
            MatrixSource { name: "w".into(), bytes: Arc::new(bytes), range, dtype: bf16::DTYPE, size };
        let w = HostMatrix::new(source).expect("a weight");
        let (mut values, mut residuals, mut energy) = ([0.0; 16], [0.0; 16], [0.0; 1]);
        let mut scratch = vec![0f32; cpu.rsvd_scratch(1, size, &sketch)];
        group.throughput(Throughput::Bytes((3 * 2 * size.0 * size.1) as u64));
        group.bench_function(format!("{} x {}, rank 16", size.0, size.1), |b| {
            b.iter(|| {
                cpu.rsvd(Rsvd {
                    values: &mut values,
                    residuals: &mut residuals,
                    energy: &mut energy,
                    vectors: None,
                    scratch: &mut scratch,
                    a: &[&w],
                    tensors: &[0],
                    sketch,
                })
                .expect("finite numbers")
            })
        });
    }
}

/// One adapter of rank 8, and four.
pub fn merge(c: &mut Criterion) {
    let cpu = cpu();
    let (o, i) = (4096, 4096);
    let (a, b) = (numbers::<f32>(2, 8 * i), numbers::<f32>(3, o * 8));
    let mut w = numbers::<bf16>(1, o * i);
    let mut sums = vec![0.0; o / 8];
    let mut group = c.benchmark_group("merge");
    group.sample_size(10).throughput(Throughput::Bytes((2 * 2 * o * i) as u64));
    for adapters in [1, 4] {
        group.bench_function(format!("4096 x 4096, rank 8 of {adapters}"), |bench| {
            bench.iter(|| {
                let update = |_| Update { a: &a[..], b: &b[..], rank: 8, scale: 1e-3 };
                let updates = (0..adapters).map(update).collect();
                cpu.merge::<bf16>(Merge { w: &mut w, sums: &mut sums, updates, out: o, inner: i })
                    .expect("sizes that fit")
            })
        });
    }
}
