//! Dense f64 definitions that the factor algebra is tested against, written from the formulas alone.
#![allow(dead_code)]

pub mod methods;

use std::path::Path;

use anabranch::backend::Backend;
use anabranch::checkpoint::input_grams::{FORMAT, INPUT_GRAMS, tensor_name};
use anabranch::checkpoint::module::{Module, Source, Target};
use anabranch::checkpoint::writer::{SafetensorsWriter, TensorSpec};
use anabranch::cpu::Cpu;
use anabranch::fuse::compare::{Compared, Wanted, compare};
use anabranch::fuse::options::{Gate, SharedRank};
use anabranch::fuse::{Batch, Factors, Frame, LoraCr};
use anabranch::tensor::DType;
use faer::{Mat, MatRef};

/// A stream of numbers in (-1, 1) from a seed.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }

    pub fn matrix(&mut self, rows: usize, columns: usize) -> Mat<f64> {
        Mat::from_fn(rows, columns, |_, _| self.next())
    }
}

/// One adapter: `B[O, R]`, `A[R, I]`.
pub type Pair = (Mat<f64>, Mat<f64>);

/// Random adapters whose ranks' strengths differ, so that singular values lie apart.
pub fn adapters(seed: u64, o: usize, i: usize, ranks: &[usize]) -> Vec<Pair> {
    let mut random = Random(seed);
    ranks
        .iter()
        .enumerate()
        .map(|(e, &r)| {
            let strength = |k: usize| 0.7_f64.powi(k as i32) * (1.0 + 0.37 * e as f64);
            let b = random.matrix(o, r);
            (Mat::from_fn(o, r, |x, k| b[(x, k)] * strength(k)), random.matrix(r, i))
        })
        .collect()
}

/// The batch of these adapters.
pub fn batch(pairs: &[Pair]) -> Batch {
    let ranks: Vec<usize> = pairs.iter().map(|(b, _)| b.ncols()).collect();
    let row = |p: usize| {
        let mut p = p;
        for (e, &r) in ranks.iter().enumerate() {
            if p < r {
                return (e, p);
            }
            p -= r;
        }
        unreachable!()
    };
    let p = ranks.iter().sum();
    let bt = Mat::from_fn(p, pairs[0].0.nrows(), |p, x| pairs[row(p).0].0[(x, row(p).1)]);
    let a = Mat::from_fn(p, pairs[0].1.ncols(), |p, x| pairs[row(p).0].1[(row(p).1, x)]);
    let module = Module { layer: 3, target: Target::Up };
    let size = (bt.ncols(), a.ncols());
    Batch::new(Frame::new(module, size, &ranks), Factors::new(bt, a).unwrap()).unwrap()
}

/// The upper triangle of a Gram, row by row, as its file holds it.
pub fn upper(g: &Mat<f64>) -> Vec<f32> {
    (0..g.nrows()).flat_map(|i| (i..g.nrows()).map(move |j| (i, j))).map(|at| g[at] as f32).collect()
}

/// The file of the Grams of these inputs, each its layer, its place and its upper triangle, in the folder `dir`.
pub fn write_grams(dir: &Path, tokens: u64, grams: &[(usize, Source, Vec<f32>)]) {
    let spec =
        |(l, s, x): &(usize, Source, Vec<f32>)| TensorSpec::new(tensor_name(*l, *s), DType::F32, [x.len()]);
    let metadata = [("format", FORMAT), ("tokens", &tokens.to_string())];
    let path = dir.join(INPUT_GRAMS);
    let mut file = SafetensorsWriter::create(&path, grams.iter().map(spec).collect(), &metadata).unwrap();
    for (l, s, x) in grams {
        file.write(&tensor_name(*l, *s), bytemuck::cast_slice(x)).unwrap();
    }
    file.finish().unwrap();
}

/// `B A` of every adapter of a batch.
pub fn updates(batch: &Batch) -> Vec<Mat<f64>> {
    (0..batch.frame.edges()).map(|e| batch.bt(e).transpose() * batch.a(e)).collect()
}

/// `B A`.
pub fn dense(f: &Factors) -> Mat<f64> {
    f.b() * f.a()
}

/// `Σ cₑ xₑ`.
pub fn weighted(x: &[Mat<f64>], c: &[f64]) -> Mat<f64> {
    let mut out = Mat::zeros(x[0].nrows(), x[0].ncols());
    for (x, c) in x.iter().zip(c) {
        out += faer::Scale(*c) * x;
    }
    out
}

/// `‖x − y‖ / ‖y‖`, or `‖x‖` where y is 0; NaN stays NaN.
pub fn distance(x: MatRef<'_, f64>, y: MatRef<'_, f64>) -> f64 {
    let d = (x - y).norm_l2();
    if y.norm_l2() > 0.0 { d / y.norm_l2() } else { d }
}

/// One direction of the dense algorithm.
pub struct Direction {
    pub sigma: f64,
    pub conflict: f64,
    pub gamma: Vec<f64>,
}

/// LoRA-CR on dense updates: SVD of `[D₁ … D_E]`, rows `zᵢₖ = uₖᵀ Dᵢ`, gate, `U diag(γᵢ) Uᵀ Dᵢ`.
pub fn lora_cr(d: &[Mat<f64>], rank: SharedRank, gate: Gate) -> (Vec<Mat<f64>>, Vec<Direction>) {
    let (o, i, edges) = (d[0].nrows(), d[0].ncols(), d.len());
    let all = Mat::from_fn(o, i * edges, |r, c| d[c / i][(r, c % i)]);
    let svd = all.thin_svd().unwrap();
    let sigma: Vec<f64> = svd.S().column_vector().iter().copied().collect();
    if sigma[0] == 0.0 {
        return (d.to_vec(), vec![]);
    }
    let energy: f64 = sigma.iter().map(|s| s * s).sum();
    let mut k_max = sigma.iter().filter(|&&s| s > 1e-6 * sigma[0]).count();
    match rank {
        SharedRank::All => {}
        SharedRank::Top(n) => k_max = k_max.min(n),
        SharedRank::Energy(e) => {
            let mut sum = 0.0;
            let mut k = 0;
            while sum < e * energy && k < sigma.len() {
                sum += sigma[k] * sigma[k];
                k += 1;
            }
            k_max = k_max.min(k);
        }
    }
    let mut out: Vec<Mat<f64>> = vec![Mat::zeros(o, i); edges];
    let mut directions = vec![];
    for (k, &size) in sigma.iter().enumerate().take(k_max) {
        let u = svd.U().col(k);
        let z: Vec<_> = d.iter().map(|d| u.transpose() * d).collect();
        let a: Vec<f64> = z.iter().map(|z| z.norm_l2()).collect();
        let live: Vec<bool> = a.iter().map(|&a| a > 1e-7 * size).collect();
        let w: Vec<f64> = (0..edges).map(|e| if live[e] { a[e] } else { 0.0 }).collect();
        let total: f64 = w.iter().sum();
        let mean = faer::Row::<f64>::from_fn(i, |c| (0..edges).map(|e| w[e] * z[e][c]).sum::<f64>() / total);
        let length = mean.norm_l2();
        let none = length <= 1e-7 * w.iter().copied().fold(0.0, f64::max);
        let cos = |e: usize| {
            if none || !live[e] {
                return 0.0;
            }
            let dot: f64 = (0..i).map(|c| z[e][c] * mean[c]).sum();
            (dot / (a[e] * length)).clamp(-1.0, 1.0)
        };
        let c = ((0..edges).map(|e| w[e] * (1.0 - cos(e))).sum::<f64>() / (2.0 * total)).clamp(0.0, 1.0);
        let gamma: Vec<f64> = (0..edges)
            .map(|e| match gate {
                Gate::Paper => (1.0 - c) * cos(e).max(0.0),
                Gate::Opposition => {
                    let others: f64 = (0..edges).filter(|&j| j != e).map(|j| w[j]).sum();
                    let mut lost = 0.0;
                    for j in (0..edges).filter(|&j| j != e && live[j] && live[e]) {
                        let dot: f64 = (0..i).map(|c| z[e][c] * z[j][c]).sum();
                        lost += w[j] / others * (-dot / (a[e] * a[j])).max(0.0);
                    }
                    1.0 - lost
                }
            })
            .collect();
        for (e, out) in out.iter_mut().enumerate() {
            *out += faer::Scale(gamma[e]) * (u * &z[e]);
        }
        directions.push(Direction { sigma: size, conflict: c, gamma });
    }
    (out, directions)
}

/// The magnitude of the entry at place `⌊density · n⌋` of `x` by magnitude, counted from 1; the least where there is no
/// such place.
pub fn threshold(x: impl Iterator<Item = f64>, density: f64, n: usize) -> f64 {
    let mut x: Vec<f64> = x.map(f64::abs).collect();
    x.sort_by(|a, b| b.total_cmp(a));
    x[((density * n as f64) as usize).clamp(1, x.len()) - 1]
}

/// Every entry of a matrix.
pub fn all(x: &Mat<f64>) -> impl Iterator<Item = f64> + '_ {
    (0..x.nrows()).flat_map(move |r| (0..x.ncols()).map(move |c| x[(r, c)]))
}

/// An update without the entries that are smaller than `least`.
pub fn trimmed(d: &Mat<f64>, least: f64) -> Mat<f64> {
    d.map(|x| if x.abs() >= least { *x } else { 0.0 })
}

/// The mean of those whose sign is the weighted sum's, + where that is zero. Only ratios of weights matter: the largest
/// is taken as 1, so that integers of equal weight cancel exactly.
pub fn elected(d: &[Mat<f64>], weights: &[f64]) -> Mat<f64> {
    let unit = weights.iter().copied().fold(0.0, f64::max);
    Mat::from_fn(d[0].nrows(), d[0].ncols(), |r, c| {
        let at: Vec<(f64, f64)> = d.iter().zip(weights).map(|(d, w)| (d[(r, c)], w / unit)).collect();
        let sum: f64 = at.iter().map(|(x, w)| w * x).sum();
        let sign = if sum < 0.0 { -1.0 } else { 1.0 };
        let agree = at.iter().filter(|(x, _)| x * sign > 0.0);
        let (sum, weight) = agree.fold((0.0, 0.0), |s, (x, w)| (s.0 + w * x, s.1 + w));
        if weight > 0.0 { sum / weight } else { 0.0 }
    })
}

/// Two threads.
pub fn cpu() -> Cpu {
    Cpu::new(2).unwrap()
}

/// What is known of one batch that nothing resolved, on the CPU.
pub fn compared(batch: &Batch) -> Compared {
    compare(&cpu(), std::slice::from_ref(batch), None, Wanted::Scores).unwrap().remove(0)
}

/// What `options` make of one batch, and the batch after it.
pub fn resolve<B: Backend>(backend: &B, batch: &Batch, options: &LoraCr) -> (Batch, Compared) {
    let compared =
        compare(backend, std::slice::from_ref(batch), Some(options), Wanted::Factors).unwrap().remove(0);
    (compared.resolved.as_ref().and_then(|r| r.batch.clone()).unwrap(), compared)
}
