// The tests of lora_cr.rs, once for each device: `resolve` and `CASES` are its.

use anabranch::fuse::options::{Gate, Restore, SharedRank, Side};
use anabranch::fuse::LoraCr;
use anabranch::fuse::compare::Resolved;
use super::dense::{self, Pair, Random, adapters, batch, distance, updates, weighted};
use faer::{Mat, Scale};
use proptest::prelude::*;

/// The resolved updates under the paper's defaults.
fn resolved(pairs: &[Pair]) -> (Vec<Mat<f64>>, Resolved) {
    let (out, resolution) = resolve(&batch(pairs), LoraCr::default());
    (updates(&out), resolution)
}

fn transposed(d: &[Mat<f64>]) -> Vec<Mat<f64>> {
    d.iter().map(|d| d.transpose().to_owned()).collect()
}

#[track_caller]
fn close(got: &[Mat<f64>], want: &[Mat<f64>], tolerance: f64) {
    let size: f64 = want.iter().map(|w| w.squared_norm_l2()).sum::<f64>().sqrt();
    for (e, (g, w)) in got.iter().zip(want).enumerate() {
        let err = (g - w).norm_l2() / if size > 0.0 { size } else { 1.0 };
        assert!(err <= tolerance, "adapter {e}: {err:e} > {tolerance:e}");
    }
}

#[test]
fn agrees_with_the_dense_definition() {
    let shapes: [(usize, usize, &[usize]); 7] = [
        (40, 30, &[4, 4]),
        (64, 16, &[8, 8]),
        (16, 64, &[3, 5, 2]),
        (6, 20, &[4, 4]),
        (20, 6, &[4, 4]),
        (1, 9, &[1, 2]),
        (31, 29, &[2, 2, 2, 2, 2, 2, 2, 2]),
    ];
    for (s, (o, i, ranks)) in shapes.into_iter().enumerate() {
        let b = batch(&adapters(s as u64, o, i, ranks));
        let d = updates(&b);
        for rank in [SharedRank::All, SharedRank::Top(3), SharedRank::Energy(0.8)] {
            for gate in [Gate::Paper, Gate::Opposition] {
                let options = LoraCr { shared_rank: rank, gate, ..LoraCr::default() };
                let (want, directions) = dense::lora_cr(&d, rank, gate);
                let (got, resolution) = resolve(&b, options);
                close(&updates(&got), &want, 1e-10);
                assert_eq!(resolution.directions.len(), directions.len(), "{o} {i} {ranks:?} {rank}");
                for (got, want) in resolution.directions.iter().zip(&directions) {
                    assert!((got.sigma / want.sigma - 1.0).abs() <= 1e-10);
                    assert!((got.conflict - want.conflict).abs() <= 1e-9);
                    for (g, w) in got.gamma.iter().zip(&want.gamma) {
                        assert!((g - w).abs() <= 1e-9, "{g} {w}");
                    }
                }
                assert!(got.stack.a() == b.stack.a(), "the left side changed A");

                let (got, _) = resolve(&b, LoraCr { side: Side::Right, ..options });
                let (right, _) = dense::lora_cr(&transposed(&d), rank, gate);
                close(&updates(&got), &transposed(&right), 1e-10);
                assert!(got.stack.bt() == b.stack.bt(), "the right side changed B");

                let (got, _) = resolve(&b, LoraCr { side: Side::Both, ..options });
                let (both, _) = dense::lora_cr(&transposed(&want), rank, gate);
                close(&updates(&got), &transposed(&both), 1e-8);
            }
        }
    }
}

#[test]
fn one_adapter_is_left_as_it_is() {
    let pairs = adapters(1, 30, 20, &[5]);
    let (got, resolution) = resolved(&pairs);
    close(&got, &updates(&batch(&pairs)), 1e-12);
    assert!(resolution.directions.iter().all(|d| d.conflict <= 1e-12));
}

#[test]
fn identical_adapters_at_any_positive_scales_are_left_as_they_are() {
    let one = adapters(2, 30, 20, &[4]).remove(0);
    let scaled = |s: f64| (Scale(s) * &one.0, one.1.clone());
    let pairs = [scaled(1.0), scaled(3.7), scaled(0.02)];
    let (got, resolution) = resolved(&pairs);
    close(&got, &updates(&batch(&pairs)), 1e-11);
    assert!(resolution.directions.iter().all(|d| d.conflict <= 1e-12));
}

#[test]
fn beside_a_zero_adapter_the_other_is_unchanged() {
    let mut pairs = adapters(3, 30, 20, &[4, 4]);
    pairs[1].0 = Mat::zeros(30, 4);
    let (got, _) = resolved(&pairs);
    close(&got, &updates(&batch(&pairs)), 1e-11);
    assert_eq!(got[1].norm_max(), 0.0);
}

#[test]
fn zero_adapters_stay_zero_without_conflict() {
    let mut pairs = adapters(3, 30, 20, &[4, 4]);
    pairs.iter_mut().for_each(|p| p.0 = Mat::zeros(30, 4));
    let (got, resolution) = resolved(&pairs);
    assert!(got.iter().all(|d| d.norm_max() == 0.0));
    assert!(resolution.directions.is_empty());
}

#[test]
fn exact_negation_cancels() {
    let one = adapters(4, 30, 20, &[4]).remove(0);
    let pairs = [one.clone(), (Scale(-1.0) * &one.0, one.1.clone())];
    let (got, resolution) = resolved(&pairs);
    assert!(got.iter().all(|d| d.norm_max() == 0.0));
    assert_eq!(resolution.directions.len(), 4);
    for d in &resolution.directions {
        assert!((d.conflict - 0.5).abs() <= 1e-15 && d.gamma == [0.0, 0.0]);
    }
}

#[test]
fn two_to_one_negation_leaves_two_thirds_of_the_larger() {
    let one = adapters(5, 30, 20, &[4]).remove(0);
    let pairs = [(Scale(2.0) * &one.0, one.1.clone()), (Scale(-1.0) * &one.0, one.1.clone())];
    let (_, resolution) = resolved(&pairs);
    for d in &resolution.directions {
        assert!((d.conflict - 1.0 / 3.0).abs() <= 1e-10 && (d.gamma[0] - 2.0 / 3.0).abs() <= 1e-10);
        assert_eq!(d.gamma[1], 0.0);
    }
}

#[test]
fn disjoint_output_rows_are_left_as_they_are() {
    let mut pairs = adapters(6, 30, 20, &[4, 4]);
    for (e, (b, _)) in pairs.iter_mut().enumerate() {
        *b = Mat::from_fn(30, 4, |o, k| if o % 2 == e { b[(o, k)] } else { 0.0 });
    }
    let (got, resolution) = resolved(&pairs);
    close(&got, &updates(&batch(&pairs)), 1e-11);
    assert!(resolution.directions.iter().all(|d| d.conflict <= 1e-11));
}

#[test]
fn a_common_scale_scales_the_output_and_leaves_the_scores() {
    let pairs = adapters(7, 30, 20, &[4, 4]);
    let scaled: Vec<Pair> = pairs.iter().map(|(b, a)| (Scale(1e-3) * b, a.clone())).collect();
    let ((got, x), (want, y)) = (resolved(&scaled), resolved(&pairs));
    close(&got, &want.iter().map(|w| Scale(1e-3) * w).collect::<Vec<_>>(), 1e-11);
    for (x, y) in x.directions.iter().zip(&y.directions) {
        assert!((x.conflict - y.conflict).abs() <= 1e-11);
    }
}

#[test]
fn the_gauge_of_the_factors_does_not_matter() {
    let pairs = adapters(8, 30, 20, &[3, 3]);
    let mut random = Random(80);
    let other: Vec<Pair> = pairs
        .iter()
        .map(|(b, a)| {
            let g = Mat::<f64>::identity(3, 3) + Scale(0.4) * random.matrix(3, 3);
            let inverse = faer::linalg::solvers::DenseSolveCore::inverse(&g.partial_piv_lu());
            (b * g, inverse * a)
        })
        .collect();
    close(&resolved(&other).0, &resolved(&pairs).0, 1e-10);
    // A lopsided split of one product: the rank cut must not see it.
    let lopsided = [pairs[0].clone(), (Scale(1e-9) * &pairs[1].0, Scale(1e9) * &pairs[1].1)];
    close(&resolved(&lopsided).0, &resolved(&pairs).0, 1e-10);
}

#[test]
fn resolving_before_or_after_recovery_is_the_same() {
    let pairs = adapters(9, 12, 10, &[3, 3]);
    let kept = [0usize, 2, 3, 7, 8, 9, 13, 14, 15, 18, 19, 20];
    let scatter = |x: &Mat<f64>| {
        let mut out = Mat::zeros(22, x.ncols());
        (0..12).for_each(|o| (0..x.ncols()).for_each(|k| out[(kept[o], k)] = x[(o, k)]));
        out
    };
    let full: Vec<Pair> = pairs.iter().map(|(b, a)| (scatter(b), a.clone())).collect();
    let want: Vec<_> = resolved(&pairs).0.iter().map(scatter).collect();
    close(&resolved(&full).0, &want, 1e-12);
}

/// math.md's closed form of one direction of two adapters with norms a, b and cosine rho.
fn two(a: f64, b: f64, rho: f64) -> (f64, [f64; 2]) {
    let q = (a.powi(4) + b.powi(4) + 2.0 * a * a * b * b * rho).sqrt();
    let cos = [(a * a + b * b * rho) / q, (b * b + a * a * rho) / q];
    let c = 0.5 * (1.0 - (a * a + b * b - a * b * (1.0 - rho)) / q);
    (c, cos.map(|x| (1.0 - c) * x.max(0.0)))
}

#[test]
fn one_output_row_has_the_closed_form_of_two() {
    for (a, b, rho) in [(1.0, 1.0, 0.3), (2.0, 1.0, 0.0), (1.0, 3.0, -0.9), (1.0, 0.5, 1.0), (2.0, 1.0, -1.0)]
    {
        let sine = (1.0_f64 - rho * rho).max(0.0).sqrt();
        let pair = |x: f64, y: f64| (Mat::<f64>::full(1, 1, 1.0), Mat::from_fn(1, 2, |_, i| [x, y][i]));
        let (_, resolution) = resolved(&[pair(a, 0.0), pair(b * rho, b * sine)]);
        let (c, gamma) = two(a, b, rho);
        assert_eq!(resolution.directions.len(), 1);
        let d = &resolution.directions[0];
        assert!((d.conflict - c).abs() <= 1e-12, "{a} {b} {rho}: {} {c}", d.conflict);
        assert!((d.gamma[0] - gamma[0]).abs() <= 1e-12 && (d.gamma[1] - gamma[1]).abs() <= 1e-12);
        assert!(d.conflict <= 0.5 + 1e-15);
    }
}

/// n adapters of one output row each, the rows orthonormal.
fn orthogonal_rows(n: usize) -> Vec<Pair> {
    let row = |e: usize| Mat::from_fn(1, n, |_, i| if i == e { 1.0 } else { 0.0 });
    (0..n).map(|e| (Mat::full(1, 1, 1.0), row(e))).collect()
}

#[test]
fn equal_orthogonal_rows_have_the_closed_form_of_n() {
    for n in [2usize, 8, 64] {
        let pairs = orthogonal_rows(n);
        let root = (n as f64).sqrt();
        let d = &resolved(&pairs).1.directions[0];
        assert!((d.conflict - (1.0 - 1.0 / root) / 2.0).abs() <= 1e-12);
        assert!(d.gamma.iter().all(|g| (g - (1.0 + 1.0 / root) / (2.0 * root)).abs() <= 1e-12));
    }
}

#[test]
fn opposition_leaves_orthogonal_updates_alone() {
    let mut pairs = adapters(10, 30, 20, &[4, 4]);
    for (e, (_, a)) in pairs.iter_mut().enumerate() {
        *a = Mat::from_fn(4, 20, |k, i| if i % 2 == e { a[(k, i)] } else { 0.0 });
    }
    let b = batch(&pairs);
    let (got, _) = resolve(&b, LoraCr { gate: Gate::Opposition, ..LoraCr::default() });
    close(&updates(&got), &updates(&b), 1e-11);
    assert!(distance(resolved(&pairs).0[0].as_ref(), updates(&b)[0].as_ref()) >= 0.05);
}

#[test]
fn restore_gives_norms_back() {
    let b = batch(&adapters(11, 30, 20, &[4, 4, 4]));
    let d = updates(&b);
    for side in [Side::Left, Side::Right, Side::Both] {
        let (got, _) = resolve(&b, LoraCr { restore: Restore::Client, side, ..LoraCr::default() });
        for (got, want) in updates(&got).iter().zip(&d) {
            assert!((got.norm_l2() / want.norm_l2() - 1.0).abs() <= 1e-12);
        }
        let (got, _) = resolve(&b, LoraCr { restore: Restore::Global, side, ..LoraCr::default() });
        let (x, y) =
            (weighted(&updates(&got), &b.frame.weights).norm_l2(), weighted(&d, &b.frame.weights).norm_l2());
        assert!((x / y - 1.0).abs() <= 1e-12, "{x} {y}");
    }
    // Of 64 equal orthogonal rows each keeps 0.07 of its norm; the factor stops at 4.
    let pairs = orthogonal_rows(64);
    let (got, _) = resolve(&batch(&pairs), LoraCr { restore: Restore::Client, ..LoraCr::default() });
    for (got, plain) in updates(&got).iter().zip(&resolved(&pairs).0) {
        assert!((got.norm_l2() / plain.norm_l2() - 4.0).abs() <= 1e-12);
    }
}

#[test]
fn factors_in_f32_agree_within_1e5() {
    let pairs = adapters(13, 96, 64, &[8, 8]);
    let rounded: Vec<Pair> =
        pairs.iter().map(|(b, a)| (b.map(|x| *x as f32 as f64), a.map(|x| *x as f32 as f64))).collect();
    close(&resolved(&rounded).0, &resolved(&pairs).0, 1e-5);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: CASES, ..ProptestConfig::default() })]

    #[test]
    fn any_shape_agrees_with_the_dense_definition(
        seed in any::<u64>(), o in 1usize..12, i in 1usize..12,
        ranks in prop::collection::vec(1usize..5, 1..4), dead in 0usize..8, copy in any::<bool>(),
    ) {
        let mut pairs = adapters(seed, o, i, &ranks);
        if dead < pairs.len() {
            pairs[dead].0 = Mat::zeros(o, ranks[dead]);
        }
        if copy {
            // A column twice: rank-deficient.
            let (b, _) = &mut pairs[0];
            let last = b.ncols() - 1;
            (0..o).for_each(|x| b[(x, last)] = b[(x, 0)]);
        }
        let b = batch(&pairs);
        let d = updates(&b);
        let (want, directions) = dense::lora_cr(&d, SharedRank::All, Gate::Paper);
        // Where two singular values nearly meet, the directions themselves are not defined.
        let apart = directions.windows(2).all(|w| w[0].sigma >= 1.02 * w[1].sigma);
        let strong = directions.iter().all(|x| x.sigma >= 1e-4 * directions[0].sigma);
        prop_assume!(apart && strong);
        let (got, resolution) = resolve(&b, LoraCr::default());
        prop_assert_eq!(resolution.directions.len(), directions.len());
        let size: f64 = d.iter().map(|d| d.norm_l2()).sum();
        for (got, want) in updates(&got).iter().zip(&want) {
            let err = (got - want).norm_l2();
            prop_assert!(err <= 1e-8 * size, "{}", err / size);
        }
        for (e, x) in updates(&got).iter().enumerate() {
            let s = x.singular_values().unwrap();
            let rank = s.iter().filter(|&&v| v > 1e-9 * size).count();
            prop_assert!(rank <= ranks[e]);
        }
    }
}
