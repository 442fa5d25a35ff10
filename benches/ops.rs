//! One case per operation, the same for every back end, at LLaMA-3-8B's sizes, full and pruned by 0.2, 0.4, 0.6 and 0.8
//! (8,192 tokens on CUDA, 512 on the CPU), on the CPU also at those of a 157 M-parameter model and of the demo.
//!
//! The device's roofs are measured first: a copy of its memory, our largest square product, and on the CPU multiply-adds
//! whose operands never leave the registers, which are the roof of products there. The table at the end has each case's
//! time, TFLOP/s or GB/s, and share of its roof. CUDA is timed by events on the device; without one it is
//! left out, and says so.
//!
//! `cargo bench --bench ops -- cuda/linear` runs the cases whose names contain that. `ANABRANCH_BENCH_SIZES=toy` takes
//! sizes that an emulated device manages; `ANABRANCH_BENCH_JSON=FILE` writes the table's numbers there.

mod ops {
    pub mod adapters;
    pub mod bench;
    pub mod data;
    pub mod products;
    pub mod rows;
    pub mod sizes;
    pub mod weights;
}

use anabranch::cpu::Cpu;
use anabranch::cuda::{self, Cuda};
use anabranch::tensor::{DType, Real};
use criterion::Criterion;
use half::bf16;
use ops::bench::{Bench, Timed};
use ops::sizes::{Model, Scale};

fn cases<B: Timed, T: Real>(bench: &mut Bench<'_, B>, models: &[Model]) {
    for model in models {
        ops::products::linears::<B, T>(bench, model);
        ops::products::head::<B, T>(bench, model);
        ops::products::importance::<B, T>(bench, model);
        ops::rows::all::<B, T>(bench, model);
        ops::rows::attention::<B, T>(bench, model);
        ops::weights::merge::<B, T>(bench, model);
    }
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    let scale = Scale::asked();
    let mut report = ops::bench::Report::default();
    match device() {
        Ok(gpu) if gpu.name() == EMULATED && scale == Scale::Full => {
            println!("cuda: left out, the driver is emulated; ANABRANCH_BENCH_SIZES=toy takes sizes for it");
        }
        Ok(gpu) => {
            let mut bench = Bench::new(&gpu, &mut criterion, &mut report, scale, DType::BF16);
            cases::<Cuda, bf16>(&mut bench, &Model::on_gpu(scale));
            ops::rows::optimizer(&mut bench, scale);
            ops::adapters::all(&mut bench, scale);
            ops::weights::rsvd(&mut bench, &Model::on_gpu(scale)[0]);
        }
        Err(why) => println!("cuda: left out, {why}"),
    }
    let cpu = Cpu::new(std::thread::available_parallelism().map_or(1, |n| n.get())).expect("threads");
    let models = Model::on_cpu(scale);
    cases::<Cpu, bf16>(&mut Bench::new(&cpu, &mut criterion, &mut report, scale, DType::BF16), &models);
    let mut bench = Bench::new(&cpu, &mut criterion, &mut report, scale, DType::F32);
    cases::<Cpu, f32>(&mut bench, &models);
    ops::rows::optimizer(&mut bench, scale);
    ops::adapters::all(&mut bench, scale);
    ops::weights::rsvd(&mut bench, &models[0]);
    report.finish().expect("ANABRANCH_BENCH_JSON can be written");
    criterion.final_summary();
}

/// What the emulated driver calls its device.
const EMULATED: &str = "CPU emulator";

fn device() -> anabranch::Result<Cuda> {
    cuda::find().driver?;
    Cuda::new(0, None)
}
