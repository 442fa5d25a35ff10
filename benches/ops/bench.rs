//! A back end's cases: timed by the device's own clock, beside roofs that are measured on it first.

use std::cell::{Cell, RefCell};
use std::fs;
use std::time::{Duration, Instant};

use anabranch::Result;
use anabranch::backend::Backend;
use anabranch::cpu::Cpu;
use anabranch::cuda::Cuda;
use anabranch::tensor::DType;
use criterion::{Criterion, SamplingMode, Throughput};
use half::bf16;
use serde_json::{Value, json};

use super::data;
use super::products;
use super::sizes::Scale;

/// Samples of a case.
const SAMPLES: usize = 10;

/// A back end that says how long its work takes.
pub trait Timed: Backend {
    /// `cpu` or `cuda`.
    const NAME: &'static str;
    /// What the machine calls it.
    fn device(&self) -> String;
    /// Time of `work` until its last effect.
    fn time(&self, work: impl FnOnce() -> Result<()>) -> Result<Duration>;
    /// Multiplies and adds this dtype from registers alone, as often as `rounds` says: how many times; none where that is not
    /// to be had.
    fn multiply_adds(&self, dtype: DType, rounds: usize) -> Option<usize>;
}

impl Timed for Cpu {
    const NAME: &'static str = "cpu";

    fn device(&self) -> String {
        format!("{} threads", self.threads())
    }

    fn time(&self, work: impl FnOnce() -> Result<()>) -> Result<Duration> {
        let start = Instant::now();
        work()?;
        Ok(start.elapsed())
    }

    fn multiply_adds(&self, dtype: DType, rounds: usize) -> Option<usize> {
        Some(Cpu::multiply_adds(self, dtype, rounds))
    }
}

impl Timed for Cuda {
    const NAME: &'static str = "cuda";

    fn device(&self) -> String {
        self.name().to_string()
    }

    fn time(&self, work: impl FnOnce() -> Result<()>) -> Result<Duration> {
        self.elapsed(work)
    }

    fn multiply_adds(&self, _: DType, _: usize) -> Option<usize> {
        None
    }
}

/// What a case does, as far as it is counted.
#[derive(Clone, Copy)]
pub enum Work {
    /// Multiplications and additions of its wide products.
    Flops(usize),
    /// Bytes that must be read and written.
    Bytes(usize),
}

/// Of one device.
#[derive(Clone, Copy)]
struct Roofs {
    /// Bytes per second, each read and written byte counted.
    copy: f64,
    /// Operations per second of our largest product.
    product: f64,
    /// Operations per second that no product can outrun, where that can be measured.
    peak: Option<f64>,
}

/// One line of the table.
struct Row {
    name: String,
    seconds: f64,
    work: Work,
    roofs: Roofs,
}

/// What was measured, of all devices.
#[derive(Default)]
pub struct Report {
    rows: Vec<Row>,
    devices: Vec<Value>,
}

/// A device's cases.
pub struct Bench<'a, B> {
    pub backend: &'a B,
    criterion: &'a mut Criterion,
    report: &'a mut Report,
    scale: Scale,
    /// Of the activations.
    dtype: DType,
    roofs: Cell<Option<Roofs>>,
}

impl<'a, B: Timed> Bench<'a, B> {
    pub fn new(
        backend: &'a B,
        criterion: &'a mut Criterion,
        report: &'a mut Report,
        scale: Scale,
        dtype: DType,
    ) -> Bench<'a, B> {
        Bench { backend, criterion, report, scale, dtype, roofs: Cell::new(None) }
    }

    /// The case `name` of `op`. `prepare` makes its buffers and gives what is timed; it runs if the case was asked for.
    pub fn case<R: FnMut() -> Result<()>>(
        &mut self,
        op: &str,
        name: &str,
        work: Work,
        prepare: impl FnOnce() -> Result<R>,
    ) {
        let samples = RefCell::new(Vec::new());
        let (backend, scale, dtype, roofs) = (self.backend, self.scale, self.dtype, &self.roofs);
        let mut group = self.criterion.benchmark_group(format!("{}/{op}", B::NAME));
        group.sample_size(SAMPLES).sampling_mode(SamplingMode::Flat);
        group.warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_millis(1500));
        group.throughput(match work {
            Work::Flops(n) => Throughput::Elements(n as u64),
            Work::Bytes(n) => Throughput::Bytes(n as u64),
        });
        let (mut prepare, mut run) = (Some(prepare), None);
        group.bench_function(name, |b| {
            if roofs.get().is_none() {
                roofs.set(Some(Roofs::measure(backend, scale, dtype).expect("the roofs")));
            }
            if let Some(prepare) = prepare.take() {
                run = Some(prepare().expect("the case's buffers"));
            }
            let run = run.as_mut().expect("prepared");
            b.iter_custom(|n| {
                let time = backend.time(|| (0..n).try_for_each(|_| run())).expect("the case runs");
                samples.borrow_mut().push(time.as_secs_f64() / n as f64);
                time
            });
        });
        group.finish();
        // What came before the last samples was to warm up.
        let samples = samples.into_inner();
        let last = samples[samples.len().saturating_sub(SAMPLES)..].to_vec();
        if let (Some(seconds), Some(roofs)) = (data::median(last), self.roofs.get()) {
            let (device, dtype) = (self.backend.device(), self.dtype.to_string());
            if self.report.devices.iter().all(|d| d["name"] != B::NAME || d["dtype"] != dtype) {
                self.report.devices.push(json!({
                    "name": B::NAME, "device": device, "dtype": dtype,
                    "copy": roofs.copy, "product": roofs.product, "peak": roofs.peak,
                }));
            }
            self.report.rows.push(Row { name: format!("{}/{op}/{name}", B::NAME), seconds, work, roofs });
        }
    }
}

impl Roofs {
    /// Copies memory, multiplies and adds in registers, then multiplies our largest square; the median of five times each.
    fn measure<B: Timed>(backend: &B, scale: Scale, dtype: DType) -> Result<Roofs> {
        let (bytes, side, rounds) = match (scale, B::NAME) {
            (Scale::Toy, _) => (1 << 16, 64, 1 << 10),
            (Scale::Full, "cuda") => (2 << 30, 8192, 0),
            (Scale::Full, _) => (256 << 20, 2048, 1 << 24),
        };
        let five = |run: &mut dyn FnMut() -> Result<()>| -> Result<f64> {
            run()?;
            let times = (0..5).map(|_| Ok(backend.time(&mut *run)?.as_secs_f64()));
            Ok(data::median(times.collect::<Result<_>>()?).unwrap_or(f64::NAN))
        };
        let copied = five(&mut data::copy(backend, bytes)?)?;
        let mut done = None;
        let spun = five(&mut || {
            done = backend.multiply_adds(dtype, rounds);
            Ok(())
        })?;
        let multiplied = match dtype {
            DType::F32 => five(&mut products::square::<B, f32>(backend, side)?)?,
            _ => five(&mut products::square::<B, bf16>(backend, side)?)?,
        };
        let roofs = Roofs {
            copy: 2.0 * bytes as f64 / copied,
            product: 2.0 * (side as f64).powi(3) / multiplied,
            peak: done.map(|n| n as f64 / spun),
        };
        let peak = roofs.peak.map_or(String::new(), |peak| {
            let (share, peak) = (100.0 * roofs.product / peak, peak / 1e12);
            format!(", multiply-adds in registers at {peak:.3} TFLOP/s, of which that is {share:.1} %")
        });
        println!(
            "{}, {}, {dtype}: a copy of {} MiB runs at {:.1} GB/s, our product of {side}³ at {:.3} TFLOP/s{peak}",
            B::NAME,
            backend.device(),
            bytes >> 20,
            roofs.copy / 1e9,
            roofs.product / 1e12
        );
        Ok(roofs)
    }
}

impl Row {
    /// Per second, its unit, and the share of the roof.
    fn rate(&self) -> (f64, &'static str, f64) {
        match self.work {
            Work::Flops(n) => {
                let rate = n as f64 / self.seconds;
                (rate / 1e12, "TFLOP/s", rate / self.roofs.peak.unwrap_or(self.roofs.product))
            }
            Work::Bytes(n) => {
                let rate = n as f64 / self.seconds;
                (rate / 1e9, "GB/s", rate / self.roofs.copy)
            }
        }
    }
}

impl Report {
    /// Prints the table, and writes its numbers where `ANABRANCH_BENCH_JSON` says.
    pub fn finish(&self) -> std::io::Result<()> {
        for row in &self.rows {
            let (rate, unit, share) = row.rate();
            let (micros, percent) = (row.seconds * 1e6, 100.0 * share);
            println!("{:<56} {micros:>12.1} µs {rate:>9.3} {unit:<7} {percent:>6.1} % of the roof", row.name);
        }
        let Some(file) = std::env::var_os("ANABRANCH_BENCH_JSON") else { return Ok(()) };
        let case = |row: &Row| {
            let (rate, unit, share) = row.rate();
            json!({"case": row.name, "seconds": row.seconds, "rate": rate, "unit": unit, "share": share})
        };
        let cases: Vec<Value> = self.rows.iter().map(case).collect();
        fs::write(file, json!({"devices": self.devices, "cases": cases}).to_string())
    }
}
