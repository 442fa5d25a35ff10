//! `lora-lego`: LoRA-LEGO (Zhao et al., *Merging LoRAs like playing LEGO*, ICLR 2025): the rank-one units of all
//! adapters, a column of B with its row of A, are clustered, and each cluster becomes one unit of the result.
//!
//! A unit's place is `[a / ‖a‖, b / ‖b‖]`; a cluster's unit is the mean `[a, b]` of its members at their mean norm. The
//! result is times `√(R / k)`, R the largest rank. An adapter's weight is how much each of its units counts in the
//! means. The clusters follow from the two Grams: no unit is looked at again before the means are made.

use faer::{Mat, MatRef};

use crate::algebra::product;
use crate::error::Result;
use crate::fuse::factors::{Batch, Factors};
use crate::fuse::grams::Grams;
use crate::ops::gate::NULL_CUT;
use crate::random::{Philox, Purpose};

/// Runs of k-means, of which the one with the least sum of squared distances is taken.
const RUNS: u64 = 10;
/// Steps of a run at most; it ends before that where no unit moves.
const STEPS: usize = 100;

/// `B[O, k]`, `A[k, I]`; a cluster that no unit is left for is a unit of zeros.
pub fn fuse(batch: &Batch, grams: &Grams, k: usize, seed: u64) -> Result<Factors> {
    let frame = &batch.frame;
    let p = frame.rank();
    let norm = |g: &Mat<f64>, j: usize| g[(j, j)].max(0.0).sqrt();
    let inverse = |n: f64| if n > 0.0 { 1.0 / n } else { 0.0 };
    let unit = |g: &Mat<f64>| (0..p).map(|j| inverse(norm(g, j))).collect::<Vec<f64>>();
    let (ub, ua) = (unit(&grams.b), unit(&grams.a));
    let near = Mat::from_fn(p, p, |i, j| grams.b[(i, j)] * ub[i] * ub[j] + grams.a[(i, j)] * ua[i] * ua[j]);
    // A unit of zeros is none: it has no place.
    let counts: Vec<f64> = frame
        .along_rank(&frame.weights)
        .into_iter()
        .enumerate()
        .map(|(j, w)| if near[(j, j)] > 0.0 { w } else { 0.0 })
        .collect();
    let module = frame.module.layer as u64 * 8 + frame.module.target as u64;
    let random = Philox::new(seed, Purpose::Clusters.stream(module));
    let clusters = k_means(near.as_ref(), &counts, k, random);

    let size = |j: usize| norm(&grams.b, j).hypot(norm(&grams.a, j));
    let output = (frame.ranks().into_iter().max().unwrap_or(0) as f64 / k as f64).sqrt();
    // Row c: what each unit's [a, b] counts in cluster c's.
    let mut mix = Mat::zeros(k, p);
    for (c, members) in clusters.iter().enumerate() {
        let total: f64 = members.iter().map(|&j| counts[j]).sum();
        let inner = |g: &Mat<f64>| {
            let row = |i: usize| members.iter().map(|&j| counts[j] * g[(i, j)]).sum::<f64>();
            members.iter().map(|&i| counts[i] * row(i)).sum::<f64>()
        };
        let length = (inner(&grams.b) + inner(&grams.a)).max(0.0).sqrt();
        let mean = members.iter().map(|&j| counts[j] * size(j)).sum::<f64>();
        // Members that cancel have a mean of no direction.
        let scale = if length > NULL_CUT * mean { mean / length } else { 0.0 };
        members.iter().for_each(|&j| mix[(c, j)] = counts[j] / total * scale);
    }
    let bt = product(mix.as_ref(), batch.stack.bt());
    let a = product(mix.as_ref(), batch.stack.a());
    Factors::new(bt * faer::Scale(output), a)
}

/// The members of each of `k` clusters of points that are known by their products `near[P, P]` and count `counts[P]`;
/// those that count 0 are in none.
///
/// Lloyd's steps from a k-means++ start, several times; the best run is taken.
fn k_means(near: MatRef<'_, f64>, counts: &[f64], k: usize, random: Philox) -> Vec<Vec<usize>> {
    let points: Vec<usize> = (0..counts.len()).filter(|&j| counts[j] > 0.0).collect();
    let mut best: Option<(f64, Vec<Vec<usize>>)> = None;
    for run in 0..RUNS {
        let (inertia, clusters) = run_of_k_means(near, counts, &points, k, random.at_step(run));
        if best.as_ref().is_none_or(|(least, _)| inertia < *least) {
            best = Some((inertia, clusters));
        }
    }
    best.map_or_else(|| vec![Vec::new(); k], |(_, clusters)| clusters)
}

fn run_of_k_means(
    near: MatRef<'_, f64>,
    counts: &[f64],
    points: &[usize],
    k: usize,
    random: Philox,
) -> (f64, Vec<Vec<usize>>) {
    let apart = |i: usize, j: usize| (near[(i, i)] - 2.0 * near[(i, j)] + near[(j, j)]).max(0.0);
    // k-means++: each further centre with a probability that grows with the squared distance to those there are.
    let mut distance = vec![f64::INFINITY; points.len()];
    let mut owner = vec![0; points.len()];
    for c in 0..k {
        let chance = |n: usize| counts[points[n]] * if c == 0 { 1.0 } else { distance[n] };
        let total: f64 = (0..points.len()).map(chance).sum();
        // Every point lies on a centre, or a distance is no number.
        if total.is_nan() || total <= 0.0 {
            break;
        }
        let mut rest = random.uniform_f64(c as u64) * total;
        let drawn = (0..points.len()).find(|&n| {
            rest -= chance(n);
            rest < 0.0 && chance(n) > 0.0
        });
        let Some(centre) = drawn.or_else(|| (0..points.len()).rev().find(|&n| chance(n) > 0.0)) else {
            break;
        };
        for n in 0..points.len() {
            let d = apart(points[n], points[centre]);
            if d < distance[n] {
                (distance[n], owner[n]) = (d, c);
            }
        }
    }
    let mut inertia = 0.0;
    for _ in 0..STEPS {
        let mut clusters = vec![Vec::new(); k];
        points.iter().zip(&owner).for_each(|(&j, &c): (&usize, &usize)| clusters[c].push(j));
        // ⟨x, centre⟩ is a mean of products; ‖centre‖² the mean of those over its members.
        let towards = |i: usize, members: &[usize]| {
            let total: f64 = members.iter().map(|&j| counts[j]).sum();
            members.iter().map(|&j| counts[j] * near[(i, j)]).sum::<f64>() / total
        };
        let lengths: Vec<f64> = clusters
            .iter()
            .map(|members| {
                let total: f64 = members.iter().map(|&j| counts[j]).sum();
                members.iter().map(|&j| counts[j] * towards(j, members)).sum::<f64>() / total
            })
            .collect();
        let mut moved = false;
        inertia = 0.0;
        for (n, &j) in points.iter().enumerate() {
            let to = |c: usize| (near[(j, j)] - 2.0 * towards(j, &clusters[c]) + lengths[c]).max(0.0);
            let (mut nearest, mut least) = (owner[n], to(owner[n]));
            for c in (0..k).filter(|&c| !clusters[c].is_empty()) {
                let d = to(c);
                // By more than rounding, so that a unit between two clusters does not wander.
                if d < least - 1e-12 * near[(j, j)] {
                    (nearest, least) = (c, d);
                }
            }
            moved |= nearest != owner[n];
            owner[n] = nearest;
            inertia += counts[j] * least;
        }
        if !moved {
            break;
        }
    }
    let mut clusters = vec![Vec::new(); k];
    points.iter().zip(&owner).for_each(|(&j, &c)| clusters[c].push(j));
    // By their first members, so that the order does not depend on the draw.
    clusters.sort_by_key(|members| members.first().copied().unwrap_or(usize::MAX));
    (inertia, clusters)
}
