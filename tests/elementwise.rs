//! `ties`, `dare` and `dare-ties` against their dense definitions: thresholds bit for bit, results in norm, adapters that
//! approximate them, and what they must not depend on.

mod dense;

use anabranch::checkpoint::module::{Module, Target};
use anabranch::fuse::dare::Drop;
use anabranch::fuse::elementwise::{Elementwise, KeptEntries, Sparse, Sums};
use anabranch::fuse::measure::Measured;
use anabranch::fuse::options::{Coverage, DensityOf, Gate, Method, SharedRank};
use anabranch::fuse::ties::Trim;
use anabranch::fuse::{Batch, Factors, Frame, Fused, Fusion, Kept, LoraCr};
use anabranch::random::{Philox, Purpose};
use dense::{
    adapters, all, batch, cpu, dense as product, distance, elected, threshold, trimmed, updates, weighted,
};
use faer::Mat;
use proptest::prelude::*;

/// O, I and the ranks of the adapters: odd, one, tall, wide, P > O, more than a tile and a strip.
const SHAPES: [(usize, usize, &[usize]); 9] = [
    (1, 1, &[1]),
    (1, 1, &[2, 1]),
    (17, 13, &[3, 3]),
    (3, 700, &[2, 5]),
    (260, 5, &[1, 1, 2]),
    (8, 512, &[4]),
    (9, 513, &[4, 4]),
    (65, 129, &[8, 8, 8]),
    (5, 7, &[4, 4, 9]),
];

fn ties(density: f64) -> Fusion {
    let sparse = Sparse::Trim(Trim { density, ..Trim::default() });
    Fusion { sparse: Some(sparse), ..Fusion::new(Method::Ties, None).unwrap() }
}

fn dropping(method: Method, drop: f64, seed: u64) -> Fusion {
    Fusion { sparse: Some(Sparse::Drop(Drop { drop })), seed, ..Fusion::new(method, None).unwrap() }
}

fn weigh(mut x: Batch, weights: &[f64]) -> Batch {
    x.frame.weights = weights.to_vec();
    x
}

/// The batch of a shape, weighted by 1 : 2 : 3 …
fn shaped(seed: u64, (o, i, ranks): (usize, usize, &[usize])) -> Batch {
    let sum = (ranks.len() * (ranks.len() + 1) / 2) as f64;
    let weights: Vec<f64> = (1..=ranks.len()).map(|e| e as f64 / sum).collect();
    weigh(batch(&adapters(seed, o, i, ranks)), &weights)
}

fn matrix(x: &[f32], (o, i): (usize, usize)) -> Mat<f64> {
    Mat::from_fn(o, i, |r, c| f64::from(x[r * i + c]))
}

/// The fused update, row by row, and its sums.
fn made(fusion: Fusion, batch: &Batch) -> (Vec<f32>, Sums, Vec<KeptEntries>) {
    fusion.check().unwrap();
    let entries = Elementwise::new(&fusion, batch, None).unwrap();
    let (o, i) = entries.size();
    let mut out = vec![f32::NAN; o * i];
    let sums = entries.rows(0..o, &mut out, true).unwrap();
    let kept = entries.kept(&sums);
    (out, sums, kept)
}

/// One of the adapters of a batch.
fn single(batch: &Batch, e: usize) -> Batch {
    let frame = Frame::new(batch.frame.module, batch.frame.size, &[batch.frame.ranks()[e]]);
    Batch::new(frame, Factors::new(batch.bt(e).to_owned(), batch.a(e).to_owned()).unwrap()).unwrap()
}

/// The entries of each update as the method sees them: alone and untrimmed they are the result.
fn entries(batch: &Batch) -> Vec<Mat<f64>> {
    let one = |e| matrix(&made(ties(1.0), &single(batch, e)).0, batch.frame.size);
    (0..batch.frame.edges()).map(one).collect()
}

#[test]
fn entries_are_those_of_the_product() {
    for shape in SHAPES {
        let x = shaped(1, shape);
        for (got, want) in entries(&x).iter().zip(updates(&x)) {
            let err = distance(got.as_ref(), want.as_ref());
            assert!(err <= 3e-7, "{shape:?}: {err:e}");
        }
    }
}

#[test]
fn thresholds_are_exact_and_results_are_the_definitions() {
    for shape in SHAPES {
        for density in [1e-9, 0.01, 0.2, 0.5, 0.999, 1.0] {
            let x = shaped(2, shape);
            let (got, sums, kept) = made(ties(density), &x);
            let n = shape.0 * shape.1;
            let seen = entries(&x);
            let least: Vec<f64> = seen.iter().map(|d| threshold(all(d), density, n)).collect();
            for ((kept, least), d) in kept.iter().zip(&least).zip(&seen) {
                // Bit for bit: a zero is never kept.
                assert_eq!(
                    kept.threshold.unwrap() as f64,
                    least.max(f64::from(f32::from_bits(1))),
                    "{shape:?} {density}"
                );
                assert_eq!(kept.kept, all(d).filter(|x| x.abs() >= *least && *x != 0.0).count() as u64);
            }
            // In f64 from the factors; where rounding takes an entry over the threshold, from the entries.
            let trim = |d: &[Mat<f64>]| {
                let least = d.iter().map(|d| threshold(all(d), density, n));
                d.iter().zip(least).map(|(d, t)| trimmed(d, t)).collect::<Vec<_>>()
            };
            let got = matrix(&got, x.frame.size);
            let want = elected(&trim(&updates(&x)), &x.frame.weights);
            let err = distance(got.as_ref(), want.as_ref());
            assert!(err <= 1e-6, "{shape:?} {density}: {err:e}");
            assert!((sums.size / got.squared_norm_l2() - 1.0).abs() <= 1e-12);
            for (along, d) in sums.along.iter().zip(&seen) {
                let dot: f64 = all(&got).zip(all(d)).map(|(x, y)| x * y).sum();
                assert!((along - dot).abs() <= 1e-12 * d.norm_l2() * got.norm_l2());
            }
        }
    }
}

/// Factors of small integers: entries, sums and halves are exact in f32 and in f64, and many are equal.
fn integers(seed: u64, o: usize, i: usize, ranks: &[usize]) -> Batch {
    let pairs: Vec<_> = adapters(seed, o, i, ranks)
        .iter()
        .map(|(b, a)| (b.map(|x| (2.0 * x).round()), a.map(|x| (1.5 * x).round())))
        .collect();
    batch(&pairs)
}

#[test]
fn equal_magnitudes_are_kept_together_and_zeros_never() {
    for (o, i, ranks) in [(40, 31, &[2, 2][..]), (16, 520, &[1, 3]), (7, 7, &[1])] {
        let x = integers(3, o, i, ranks);
        for density in [0.001, 0.1, 0.4, 0.9, 1.0] {
            let trim = |d: &Mat<f64>| trimmed(d, threshold(all(d), density, o * i));
            let d: Vec<Mat<f64>> = updates(&x).iter().map(trim).collect();
            let (got, _, kept) = made(ties(density), &x);
            assert_eq!(matrix(&got, (o, i)), elected(&d, &x.frame.weights), "{o} x {i} {density}");
            for (kept, d) in kept.iter().zip(&d) {
                assert_eq!(kept.kept as usize, all(d).filter(|x| *x != 0.0).count());
            }
        }
    }
    // All of one magnitude: any density keeps all.
    let ones = batch(&[(
        Mat::from_fn(30, 1, |r, _| if r.is_multiple_of(3) { -1.0 } else { 1.0 }),
        Mat::full(1, 20, 0.5),
    )]);
    let (got, _, kept) = made(ties(0.01), &ones);
    assert_eq!((matrix(&got, (30, 20)), kept[0].kept), (updates(&ones).remove(0), 600));
    assert_eq!(kept[0].threshold, Some(0.5));
    // Nothing but zeros.
    let zeros = batch(&[(Mat::zeros(30, 2), Mat::zeros(2, 20)), (Mat::zeros(30, 1), Mat::zeros(1, 20))]);
    for fusion in [ties(0.2), dropping(Method::Dare, 0.5, 1), dropping(Method::DareTies, 0.5, 1)] {
        let (got, sums, kept) = made(fusion, &zeros);
        assert!(got.iter().all(|x| x.to_bits() == 0) && sums.size == 0.0 && kept.iter().all(|k| k.kept == 0));
    }
    // Exact negations: the sign of a zero sum is +.
    let (b, a) = adapters(4, 6, 5, &[2]).remove(0);
    let x = batch(&[(b.clone(), a.clone()), (-&b, a)]);
    let (got, ..) = made(ties(1.0), &x);
    let seen = entries(&x);
    assert_eq!(matrix(&got, (6, 5)), Mat::from_fn(6, 5, |r, c| seen[0][(r, c)].abs()));
}

/// 2,100 × 2,049 entries: enough for a sample, and for a guess that is a little off.
#[test]
fn a_sample_does_not_change_a_threshold() {
    let mut x = batch(&adapters(5, 2100, 2049, &[2]));
    // Rows and columns of very different sizes, and a third that is zero.
    let rows: Vec<f64> = (0..2100).map(|o| if o % 3 == 0 { 0.0 } else { 1.5f64.powi(o % 30) }).collect();
    let columns: Vec<f64> = (0..2049).map(|i| 0.9f64.powi(i % 100)).collect();
    x.stack = x.stack.scaled(Some(&rows), Some(&columns));
    let seen = entries(&x).remove(0);
    let mut sizes: Vec<f64> = all(&seen).map(f64::abs).collect();
    sizes.sort_by(|a, b| b.total_cmp(a));
    for density in [1e-7, 0.2, 0.66, 0.9, 1.0] {
        let want = sizes[((density * sizes.len() as f64) as usize).max(1) - 1];
        let entries = Elementwise::new(&ties(density), &x, None).unwrap();
        let kept = entries.kept(&Sums::total(&[], 1)).remove(0);
        assert_eq!(kept.threshold.unwrap() as f64, want.max(f64::from(f32::from_bits(1))), "{density}");
    }
}

/// The mask by its definition: the uniform number at (seed, adapter, module, row, column) is at least p.
fn dropped(d: &Mat<f64>, drop: f64, seed: u64, adapter: u64, module: Module) -> Mat<f64> {
    let step = (module.layer * Target::ALL.len() + module.target as usize) as u64;
    let numbers = Philox::new(seed, Purpose::Drop.stream(adapter)).at_step(step);
    Mat::from_fn(d.nrows(), d.ncols(), |r, c| {
        let keep = f64::from(numbers.uniform((r * d.ncols() + c) as u64)) >= drop;
        if keep { d[(r, c)] / (1.0 - drop) } else { 0.0 }
    })
}

#[test]
fn dare_is_its_definition() {
    for shape in SHAPES {
        let mut x = shaped(6, shape);
        // The adapter's place among all, not among those who have the module.
        x.frame.members = (0..shape.2.len()).map(|e| 2 * e + 1).collect();
        for p in [0.0, 0.3, 0.9, 0.999] {
            let thin: Vec<Mat<f64>> = std::iter::zip(updates(&x), &x.frame.members)
                .map(|(d, &e)| dropped(&d, p, 11, e as u64, x.frame.module))
                .collect();
            let sum = weighted(&thin, &x.frame.weights);
            for (method, want) in [(Method::Dare, sum), (Method::DareTies, elected(&thin, &x.frame.weights))]
            {
                let (got, _, kept) = made(dropping(method, p, 11), &x);
                let err = distance(matrix(&got, x.frame.size).as_ref(), want.as_ref());
                assert!(err <= 1e-6, "{method} {shape:?} {p}: {err:e}");
                for (kept, thin) in kept.iter().zip(&thin) {
                    assert_eq!(
                        (kept.kept as usize, kept.threshold),
                        (all(thin).filter(|x| *x != 0.0).count(), None)
                    );
                }
            }
        }
    }
    let x = shaped(6, (65, 129, &[8, 8]));
    let (same, again, other) =
        (dropping(Method::Dare, 0.5, 1), dropping(Method::Dare, 0.5, 1), dropping(Method::Dare, 0.5, 2));
    assert_eq!(made(same, &x).0, made(again, &x).0);
    assert_ne!(made(same, &x).0, made(other, &x).0);
    let (_, _, kept) = made(same, &x);
    let (n, kept) = (65.0 * 129.0, kept[0].kept as f64);
    assert!((kept - 0.5 * n).abs() <= 5.0 * (0.25f64 * n).sqrt(), "{kept} of {n}");
}

#[test]
fn lambda_and_weights() {
    let x = shaped(7, (33, 21, &[3, 3, 3]));
    for fusion in [ties(0.3), dropping(Method::Dare, 0.4, 0), dropping(Method::DareTies, 0.4, 0)] {
        let plain = matrix(&made(fusion, &x).0, (33, 21));
        let scaled = matrix(&made(Fusion { lambda: -0.75, ..fusion }, &x).0, (33, 21));
        assert!(distance(scaled.as_ref(), (faer::Scale(-0.75) * &plain).as_ref()) <= 1e-7);
        // One who counts nothing is as good as absent.
        let without = weigh(x.clone(), &[0.25, 0.0, 0.75]);
        let mut two = batch(&[0, 2].map(|e| (x.bt(e).transpose().to_owned(), x.a(e).to_owned())));
        two.frame.members = vec![0, 2];
        let two = weigh(two, &[0.25, 0.75]);
        assert_eq!(made(fusion, &without).0, made(fusion, &two).0);
    }
}

/// Adapters whose edges kept rows 0..16 and columns all, rows all and columns 5..15.
fn pruned() -> Batch {
    let mut pairs = adapters(8, 24, 18, &[3, 3]);
    pairs[0].0 = Mat::from_fn(24, 3, |o, k| if o < 16 { pairs[0].0[(o, k)] } else { 0.0 });
    pairs[1].1 = Mat::from_fn(3, 18, |k, i| if (5..15).contains(&i) { pairs[1].1[(k, i)] } else { 0.0 });
    let mut x = batch(&pairs);
    x.frame.kept = vec![
        Kept { rows: Some((0..16).collect()), columns: None },
        Kept { rows: None, columns: Some((5..15).collect()) },
    ];
    x
}

#[test]
fn the_density_is_of_what_pruning_left_or_of_all() {
    let x = pruned();
    for (of, counts) in [(DensityOf::Support, [16 * 18, 24 * 10]), (DensityOf::Full, [24 * 18, 24 * 18])] {
        for density in [0.1, 0.25, 0.9, 1.0] {
            let fusion = Fusion {
                sparse: Some(Sparse::Trim(Trim { density, of, ..Trim::default() })),
                ..ties(density)
            };
            let (got, _, kept) = made(fusion, &x);
            let trim = |(d, n): (&Mat<f64>, usize)| trimmed(d, threshold(all(d), density, n));
            let d: Vec<Mat<f64>> = updates(&x).iter().zip(counts).map(trim).collect();
            let want = elected(&d, &x.frame.weights);
            assert!(distance(matrix(&got, (24, 18)).as_ref(), want.as_ref()) <= 1e-6, "{of} {density}");
            for (kept, (n, support)) in kept.iter().zip(counts.into_iter().zip([16 * 18, 24 * 10])) {
                assert_eq!(kept.kept, ((density * n as f64) as u64).min(support), "{of} {density}");
            }
        }
    }
    // A mean over those that kept a row; an election is that already.
    let present = |fusion: Fusion| Fusion { coverage: Coverage::Present, ..fusion };
    assert_eq!(made(present(ties(0.3)), &x).0, made(ties(0.3), &x).0);
    let d = updates(&x);
    let want = Mat::from_fn(24, 18, |o, i| {
        // Columns are covered by the whole of the weights where only rows were pruned, and the other way round.
        let (rows, columns) = (if o < 16 { 1.0 } else { 0.5 }, if (5..15).contains(&i) { 1.0 } else { 0.5 });
        0.5 * (d[0][(o, i)] + d[1][(o, i)]) / rows / columns
    });
    let got = made(present(dropping(Method::Dare, 0.0, 0)), &x).0;
    assert!(distance(matrix(&got, (24, 18)).as_ref(), want.as_ref()) <= 1e-6);
}

#[test]
fn results_depend_neither_on_threads_nor_on_how_rows_are_asked_for() {
    let x = shaped(9, (131, 600, &[5, 8]));
    for fusion in [ties(0.2), dropping(Method::Dare, 0.9, 3), dropping(Method::DareTies, 0.9, 3)] {
        let (whole, _, kept) = made(fusion, &x);
        for threads in 1..=3 {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let (again, _, same) = pool.install(|| made(fusion, &x));
            assert!(again.iter().zip(&whole).all(|(a, b)| a.to_bits() == b.to_bits()));
            assert_eq!(same, kept);
        }
        let entries = Elementwise::new(&fusion, &x, None).unwrap();
        for step in [1, 7, 64] {
            let mut parts = Vec::new();
            for first in (0..131).step_by(step) {
                let rows = first..(first + step).min(131);
                let mut out = vec![0.0; rows.len() * 600];
                parts.push(entries.rows(rows.clone(), &mut out, true).unwrap());
                assert!(out.iter().zip(&whole[rows.start * 600..]).all(|(a, b)| a.to_bits() == b.to_bits()));
            }
            assert_eq!(entries.kept(&Sums::total(&parts, 2)), kept);
        }
    }
}

#[test]
fn resolved_updates_are_fused_and_measured_against_those_read() {
    let x = shaped(10, (40, 30, &[4, 4]));
    let (resolved, compared) = dense::resolve(&cpu(), &x, &LoraCr::default());
    let (d, _) = dense::lora_cr(&updates(&x), SharedRank::All, Gate::Paper);
    let trim = |d: &Mat<f64>| trimmed(d, threshold(all(d), 0.2, 1200));
    let want = elected(&d.iter().map(trim).collect::<Vec<_>>(), &x.frame.weights);
    let entries = Elementwise::new(&ties(0.2), &resolved, Some(&x)).unwrap();
    let mut out = vec![0.0; 1200];
    let sums = entries.rows(0..40, &mut out, true).unwrap();
    let got = matrix(&out, (40, 30));
    assert!(distance(got.as_ref(), want.as_ref()) <= 1e-6);
    let weights = &x.frame.weights;
    let m = Measured::new(0.0, sums.size, &sums.along_read, &sums.along, weights, &compared).unwrap();
    let off = distance(got.as_ref(), weighted(&d, weights).as_ref());
    assert!((m.distance_to_mean - off).abs() <= 1e-6, "{} {off}", m.distance_to_mean);
    // The least-squares shares of the updates as read.
    let rest = &got - &weighted(&updates(&x), &m.effective_scale);
    for d in updates(&x) {
        let dot: f64 = all(&rest).zip(all(&d)).map(|(x, y)| x * y).sum();
        assert!(dot.abs() <= 1e-6 * d.norm_l2() * got.norm_l2(), "{dot:e}");
    }
}

#[test]
fn what_cannot_be_is_refused() {
    for density in [0.0, -0.1, 1.0000001, f64::NAN, f64::INFINITY] {
        let text = ties(density).check().unwrap_err().to_string();
        assert!(text.contains("--density") && text.contains("above 0 and at most 1"), "{text}");
    }
    for drop in [1.0, -0.1, f64::NAN, 1.0 - 1e-12] {
        let text = dropping(Method::Dare, drop, 0).check().unwrap_err().to_string();
        assert!(text.contains("--drop") && text.contains("below 1"), "{text}");
    }
    let swapped = Fusion { sparse: ties(0.2).sparse, ..Fusion::new(Method::Dare, None).unwrap() };
    assert!(swapped.check().is_err());
    assert!(Fusion { sparse: None, ..ties(0.2) }.check().is_err());
    assert!(Fusion { sparse: ties(0.2).sparse, ..Fusion::new(Method::Mean, None).unwrap() }.check().is_err());

    // Finite factors whose entries are not: 1e30 · 1e30, and the difference of two such.
    let large = |sign: f64| (Mat::from_fn(4, 2, |_, k| [1e30, sign * 1e30][k]), Mat::full(2, 3, 1e30));
    for sign in [1.0, -1.0] {
        let x = batch(&[large(sign), adapters(1, 4, 3, &[2]).remove(0)]);
        for fusion in [ties(0.5), dropping(Method::Dare, 0.9, 0), dropping(Method::DareTies, 0.9, 0)] {
            let entries = Elementwise::new(&fusion, &x, None).unwrap();
            let text = entries.rows(0..4, &mut [0.0; 12], true).unwrap_err().to_string();
            assert!(text.contains("layer 3 up") && text.contains("larger than f32 holds"), "{text}");
        }
    }
    let text = ties(0.2).fuse(&shaped(1, (9, 8, &[2])), true).unwrap_err().to_string();
    assert!(text.contains("--rank N") && text.contains("--merged"), "{text}");
    for sign in [1.0, -1.0] {
        let x = batch(&[large(sign), adapters(1, 4, 3, &[2]).remove(0)]);
        for fusion in on_entries() {
            let text = Fusion { rank: Some(2), ..fusion }.fuse(&x, true).unwrap_err().to_string();
            assert!(text.contains("layer 3 up") && text.contains("larger than f32 holds"), "{text}");
        }
    }
}

/// The fused update of a method on entries as factors of rank q, and the update itself.
fn at_rank(fusion: Fusion, x: &Batch, q: usize) -> (Fused, Mat<f64>) {
    let fused = Fusion { rank: Some(q), ..fusion }.fuse(x, true).unwrap();
    assert!(fused.factors.is_finite() && fused.factors.rank() == q.min(x.frame.size.0).min(x.frame.size.1));
    (fused, matrix(&made(fusion, x).0, x.frame.size))
}

fn on_entries() -> [Fusion; 4] {
    [ties(0.2), ties(1.0), dropping(Method::Dare, 0.9, 3), dropping(Method::DareTies, 0.5, 3)]
}

#[test]
fn an_adapter_of_full_rank_is_the_update_and_one_of_less_nearly_the_best() {
    // More rows than a part of a reading has, too.
    let more: [(usize, usize, &[usize]); 3] = [(700, 90, &[4, 4]), (90, 700, &[4, 4]), (300, 301, &[8, 8])];
    let mut worst = 0.0f64;
    for shape in SHAPES.into_iter().chain(more) {
        let (x, (o, i, _)) = (shaped(12, shape), shape);
        for fusion in on_entries() {
            let (fused, want) = at_rank(fusion, &x, o.min(i));
            let err = distance(product(&fused.factors).as_ref(), want.as_ref());
            assert!(err <= 1e-5, "{} {shape:?}, all of it: {err:e}", fusion.method);
            assert!((fused.energy_kept - 1.0).abs() <= 1e-6, "{}", fused.energy_kept);
            let sizes = want.singular_values().unwrap();
            for q in [1, 2, 5, 16] {
                if q >= o.min(i) {
                    continue;
                }
                let (fused, want) = at_rank(fusion, &x, q);
                let err = distance(product(&fused.factors).as_ref(), want.as_ref());
                let lost = sizes[q..].iter().map(|s| s * s).sum::<f64>().sqrt();
                let best = if lost > 0.0 { lost / want.norm_l2() } else { 0.0 };
                worst = worst.max(err / best.max(1e-4));
                assert!(err <= 1.01 * best + 1e-5, "{} {shape:?} rank {q}: {err} {best}", fusion.method);
                assert!(err >= best - 1e-6);
                // The part that is kept and the part that is lost are orthogonal.
                assert!((fused.energy_kept + err * err - 1.0).abs() <= 1e-6, "{} {err}", fused.energy_kept);
            }
        }
    }
    println!("at most {worst:.5} of the least error");
}

/// What the certificate measures is the distance of the entries, to any factors.
#[test]
fn the_distance_of_factors_is_that_of_the_dense_products() {
    for shape in SHAPES {
        let x = shaped(13, shape);
        let other = shaped(14, shape).stack;
        for fusion in on_entries() {
            let (fused, want) = at_rank(fusion, &x, 2);
            let entries = fused.entries.unwrap();
            for factors in [&fused.factors, &other, &x.stack, &Factors::zeros(1, x.frame.size)] {
                let (err, kept) = entries.distance_to(factors).unwrap();
                let dense = distance(product(factors).as_ref(), want.as_ref());
                assert!((err - dense).abs() <= 1e-6 * dense.max(1.0), "{shape:?}: {err} {dense}");
                assert_eq!(kept, made(fusion, &x).2);
            }
        }
    }
    // Of nothing, the size of what is there.
    let zero = batch(&[(Mat::zeros(9, 2), Mat::zeros(2, 20))]);
    let (fused, _) = at_rank(ties(0.2), &zero, 3);
    assert!(product(&fused.factors).norm_max() == 0.0 && fused.energy_kept == 1.0);
    let one = shaped(15, (9, 20, &[2])).stack;
    let (err, _) = fused.entries.unwrap().distance_to(&one).unwrap();
    assert!((err / product(&one).norm_l2() - 1.0).abs() <= 1e-6);
}

#[test]
fn an_adapter_at_a_rank_depends_on_the_seed_and_not_on_threads_or_scale() {
    let x = shaped(16, (331, 290, &[3, 5]));
    for fusion in on_entries() {
        let bits = |f: &Factors| {
            f.bt()
                .col_iter()
                .chain(f.a().col_iter())
                .flat_map(|c| c.iter().copied().collect::<Vec<_>>())
                .map(f64::to_bits)
                .collect::<Vec<_>>()
        };
        let (one, _) = at_rank(fusion, &x, 6);
        for threads in 1..=3 {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let (again, _) = pool.install(|| at_rank(fusion, &x, 6));
            assert!(bits(&again.factors) == bits(&one.factors), "{threads} threads");
            assert_eq!(again.energy_kept, one.energy_kept);
        }
        let other = Fusion { rank: Some(6), seed: fusion.seed + 1, ..fusion }.fuse(&x, true).unwrap();
        assert!(bits(&other.factors) != bits(&one.factors));
        // Products of entries of 2^-80, and of 2^90, are none of f32.
        for exponent in [-80, -31, 90] {
            let by = 2f64.powi(exponent);
            let mut y = x.clone();
            y.stack = x.stack.scaled(Some(&vec![by; 331]), None);
            let (scaled, _) = at_rank(fusion, &y, 6);
            let want = faer::Scale(by) * product(&one.factors);
            let err = distance(product(&scaled.factors).as_ref(), want.as_ref());
            assert!(err <= 1e-12, "{} at 2^{exponent}: {err:e}", fusion.method);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    #[test]
    fn ties_of_any_shape(
        seed in any::<u64>(), o in 1usize..20, i in 1usize..40, ranks in prop::collection::vec(1usize..5, 1..5),
        density in 0.0001f64..=1.0,
    ) {
        let x = integers(seed, o, i, &ranks);
        let trim = |d: &Mat<f64>| trimmed(d, threshold(all(d), density, o * i));
        let d: Vec<Mat<f64>> = updates(&x).iter().map(trim).collect();
        let want = elected(&d, &x.frame.weights);
        let got = matrix(&made(ties(density), &x).0, (o, i));
        prop_assert!(distance(got.as_ref(), want.as_ref()) <= 1e-6);
    }
}
