//! Fusion methods on dense updates, from their formulas alone: SVDs and eigenproblems of `[O, I]` and `[O, O]`.

use anabranch::fuse::options::{Gate, SharedRank};
use faer::{Mat, MatRef, Scale, Side};

use super::{lora_cr, weighted};

/// Singular values above 1e-6 of the largest, and their vectors.
pub fn svd(d: MatRef<'_, f64>) -> (Mat<f64>, Vec<f64>, Mat<f64>) {
    let svd = d.thin_svd().unwrap();
    let all: Vec<f64> = svd.S().column_vector().iter().copied().collect();
    let s: Vec<f64> = all.iter().copied().filter(|&s| s > 1e-6 * all[0]).collect();
    (svd.U().subcols(0, s.len()).to_owned(), s.clone(), svd.V().subcols(0, s.len()).to_owned())
}

fn beside(x: &[Mat<f64>]) -> Mat<f64> {
    let columns: Vec<(usize, usize)> =
        x.iter().enumerate().flat_map(|(e, x)| (0..x.ncols()).map(move |j| (e, j))).collect();
    Mat::from_fn(x[0].nrows(), columns.len(), |i, c| x[columns[c].0][(i, columns[c].1)])
}

/// `u diag(s) vᵀ`.
pub fn compose(u: &Mat<f64>, s: &[f64], v: &Mat<f64>) -> Mat<f64> {
    Mat::from_fn(u.nrows(), u.ncols(), |i, k| u[(i, k)] * s[k]) * v.transpose()
}

/// The orthogonal polar factor, on the directions that x has.
fn polar(x: &Mat<f64>) -> Mat<f64> {
    let (u, _, v) = svd(x.as_ref());
    u * v.transpose()
}

pub fn tsv(d: &[Mat<f64>], w: &[f64], lambda: f64) -> Mat<f64> {
    let (mut u, mut s, mut v) = (vec![], vec![], vec![]);
    for (d, w) in d.iter().zip(w).filter(|(d, w)| d.norm_max() * **w > 0.0) {
        let (ue, se, ve) = svd((Scale(*w) * d).as_ref());
        u.push(ue);
        s.extend(se);
        v.push(ve);
    }
    if u.is_empty() {
        return Mat::zeros(d[0].nrows(), d[0].ncols());
    }
    Scale(lambda) * compose(&polar(&beside(&u)), &s, &polar(&beside(&v)))
}

pub fn iso_c(d: &[Mat<f64>], w: &[f64], lambda: f64) -> Mat<f64> {
    let sum = weighted(d, w);
    if sum.norm_max() == 0.0 {
        return sum;
    }
    let (u, s, v) = svd(sum.as_ref());
    Scale(lambda * s.iter().sum::<f64>() / s.len() as f64) * (u * v.transpose())
}

/// TIES of equal-sized updates, entry by entry: the `density` largest of each are kept.
pub fn ties(z: &[Mat<f64>], w: &[f64], density: f64) -> Mat<f64> {
    let trimmed: Vec<Mat<f64>> = z
        .iter()
        .map(|z| {
            let mut all: Vec<f64> =
                (0..z.ncols()).flat_map(|j| (0..z.nrows()).map(move |i| z[(i, j)].abs())).collect();
            all.sort_by(|a, b| b.total_cmp(a));
            let least = all[((density * all.len() as f64) as usize).max(1) - 1];
            Mat::from_fn(z.nrows(), z.ncols(), |i, j| if z[(i, j)].abs() >= least { z[(i, j)] } else { 0.0 })
        })
        .collect();
    Mat::from_fn(z[0].nrows(), z[0].ncols(), |i, j| {
        let sum: f64 = trimmed.iter().zip(w).map(|(z, w)| w * z[(i, j)]).sum();
        let size: f64 = trimmed.iter().zip(w).map(|(z, w)| w * z[(i, j)].abs()).sum();
        let sign = if sum < -1e-10 * size { -1.0 } else { 1.0 };
        let (mut total, mut weight) = (0.0, 0.0);
        for (z, w) in trimmed.iter().zip(w).filter(|(z, _)| z[(i, j)] * sign > 0.0) {
            total += w * z[(i, j)];
            weight += w;
        }
        if weight > 0.0 { total / weight } else { 0.0 }
    })
}

pub fn knots_ties(d: &[Mat<f64>], w: &[f64], density: f64, lambda: f64) -> Mat<f64> {
    let (mut u, _, _) = svd(beside(d).as_ref());
    for k in 0..u.ncols() {
        let column = (0..u.nrows()).map(|i| u[(i, k)]);
        if column.fold(0.0_f64, |m, x| if x.abs() > m.abs() { x } else { m }) < 0.0 {
            (0..u.nrows()).for_each(|i| u[(i, k)] = -u[(i, k)]);
        }
    }
    let z: Vec<Mat<f64>> = d.iter().map(|d| u.transpose() * d).collect();
    Scale(lambda) * (&u * ties(&z, w, density))
}

/// With what is off the diagonal of every Gram times 0.9.
pub fn regmean(d: &[Mat<f64>], w: &[f64], grams: &[Mat<f64>]) -> Mat<f64> {
    let less = |g: &Mat<f64>| {
        Mat::from_fn(g.nrows(), g.ncols(), |i, j| if i == j { g[(i, j)] } else { 0.9 * g[(i, j)] })
    };
    let grams: Vec<Mat<f64>> = grams.iter().map(less).collect();
    let parts: Vec<Mat<f64>> = d.iter().zip(&grams).map(|(d, g)| d * g).collect();
    let sum = weighted(&grams, w);
    let (u, s, v) = svd(sum.as_ref());
    let inverse: Vec<f64> = s.iter().map(|s| 1.0 / s).collect();
    weighted(&parts, w) * compose(&v, &inverse, &u)
}

pub fn cat_merging(d: &[Mat<f64>], w: &[f64], grams: &[Mat<f64>], lambda: f64) -> Mat<f64> {
    let mut tau: Vec<Mat<f64>> = d.iter().zip(w).map(|(d, w)| Scale(*w) * d).collect();
    let norm: Vec<f64> = tau.iter().map(|t| t.norm_l2()).collect();
    let (o, edges) = (d[0].nrows(), d.len());
    let bases: Vec<Mat<f64>> = (0..edges)
        .map(|i| {
            let (mut g, mut size) = (Mat::<f64>::zeros(o, o), 0.0);
            for j in (0..edges).filter(|&j| j != i) {
                let theirs = &tau[j] * &grams[i] * tau[j].transpose();
                let own = &tau[j] * &grams[j] * tau[j].transpose();
                size += (0..o).map(|k| theirs[(k, k)] + own[(k, k)]).sum::<f64>();
                g += theirs - own;
            }
            let e = g.self_adjoint_eigen(Side::Lower).unwrap();
            let positive: Vec<usize> = (0..o).filter(|&k| e.S().column_vector()[k] > 1e-12 * size).collect();
            Mat::from_fn(o, positive.len(), |x, k| e.U()[(x, positive[k])])
        })
        .collect();
    for (i, q) in bases.iter().enumerate() {
        for j in (0..edges).filter(|&j| j != i) {
            let gone = q * (q.transpose() * &tau[j]);
            tau[j] -= gone;
        }
    }
    let mut out = Mat::zeros(o, d[0].ncols());
    for (t, norm) in tau.iter().zip(norm) {
        let left = t.norm_l2();
        if left > 1e-7 * norm {
            out += Scale(lambda * norm / left) * t;
        }
    }
    out
}

/// LoRA-LEGO by trying every assignment of the units `(b, a)` to `k` clusters; `counts` are the weights of the units.
pub fn lora_lego(units: &[(Vec<f64>, Vec<f64>)], counts: &[f64], k: usize, r: usize) -> Mat<f64> {
    let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
    let place = |(b, a): &(Vec<f64>, Vec<f64>)| {
        let unit = |x: &[f64]| x.iter().map(|v| v / norm(x)).collect::<Vec<f64>>();
        [unit(b), unit(a)].concat()
    };
    let places: Vec<Vec<f64>> = units.iter().map(place).collect();
    let mean = |of: &[usize], x: &dyn Fn(usize) -> Vec<f64>| {
        let total: f64 = of.iter().map(|&j| counts[j]).sum();
        let mut out = vec![0.0; x(of[0]).len()];
        for &j in of {
            out.iter_mut().zip(x(j)).for_each(|(o, x)| *o += counts[j] / total * x);
        }
        out
    };
    let n = units.len();
    let mut best: Option<(f64, Vec<Vec<usize>>)> = None;
    for code in 0..k.pow(n as u32) {
        let mut clusters = vec![vec![]; k];
        (0..n).for_each(|j| clusters[code / k.pow(j as u32) % k].push(j));
        if clusters.iter().any(Vec::is_empty) {
            continue;
        }
        let spread = |of: &Vec<usize>| {
            let centre = mean(of, &|j| places[j].clone());
            let apart = |j: &usize| places[*j].iter().zip(&centre).map(|(x, c)| (x - c).powi(2)).sum::<f64>();
            of.iter().map(|j| counts[*j] * apart(j)).sum::<f64>()
        };
        let inertia: f64 = clusters.iter().map(spread).sum();
        if best.as_ref().is_none_or(|(least, _)| inertia < *least) {
            best = Some((inertia, clusters));
        }
    }
    let (o, i) = (units[0].0.len(), units[0].1.len());
    let mut out = Mat::zeros(o, i);
    for of in best.unwrap().1 {
        let both = |j: usize| [units[j].0.clone(), units[j].1.clone()].concat();
        let centre = mean(&of, &both);
        let size = mean(&of, &|j| vec![norm(&both(j))])[0] / norm(&centre);
        let (b, a) = centre.split_at(o);
        out += Mat::from_fn(o, i, |x, y| size * b[x] * size * a[y]);
    }
    Scale((r as f64 / k as f64).sqrt()) * out
}

/// `(Σ √|w s| B)(Σ sgn(w s) √|w s| A)` of the factors as in the files.
pub fn peft_linear(pairs: &[super::Pair], w: &[f64], s: &[f64]) -> Mat<f64> {
    let c: Vec<f64> = w.iter().zip(s).map(|(w, s)| w * s).collect();
    let root: Vec<f64> = c.iter().map(|c| c.abs().sqrt()).collect();
    let signed: Vec<f64> = c.iter().map(|c| c.signum() * c.abs().sqrt()).collect();
    let b: Vec<Mat<f64>> = pairs.iter().map(|p| p.0.clone()).collect();
    let a: Vec<Mat<f64>> = pairs.iter().map(|p| p.1.clone()).collect();
    weighted(&b, &root) * weighted(&a, &signed)
}

/// Updates after LoRA-CR with its defaults.
pub fn resolved(d: &[Mat<f64>]) -> Vec<Mat<f64>> {
    lora_cr(d, SharedRank::All, Gate::Paper).0
}
