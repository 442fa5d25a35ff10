//! Every fusion method against its dense definition, the certificate against dense norms, refusals by their text.

mod dense;

use anabranch::checkpoint::convert;
use anabranch::checkpoint::module::{Module, Target};
use anabranch::fuse::conflict::{ConflictReport, module_conflicts};
use anabranch::fuse::ffa::check_frozen;
use anabranch::fuse::measure::measure;
use anabranch::fuse::options::{Coverage, Fedsa, Gate, Method, Restore, SharedRank, Side};
use anabranch::fuse::truncate::truncate;
use anabranch::fuse::{Batch, Factors, Fusion, Kept, LoraCr, Made, Outcome, Recipe, Rows};
use anabranch::tensor::DType;
use dense::{Pair, adapters, batch, compared, cpu, dense as product, distance, updates, weighted};
use faer::Mat;
use proptest::prelude::*;

const WEIGHTS: [f64; 3] = [0.5, 0.2, 0.3];

/// Three adapters of rank 4 on a 24 x 18 module, weighted.
fn three() -> Batch {
    weigh(batch(&adapters(1, 24, 18, &[4, 4, 4])), &WEIGHTS)
}

fn weigh(mut x: Batch, weights: &[f64]) -> Batch {
    x.frame.weights = weights.to_vec();
    x
}

fn frozen(mut x: Batch) -> Batch {
    x.frame.frozen = true;
    x
}

fn fuse(fusion: Fusion, batch: &Batch) -> Factors {
    fusion.fuse(batch, true).unwrap().factors
}

fn plain(method: Method) -> Fusion {
    Fusion::new(method, None).unwrap()
}

fn fedsa(choice: Fedsa) -> Fusion {
    Fusion::new(Method::Fedsa, Some(choice)).unwrap()
}

/// `Σ wᵢBᵢ` and `Σ wᵢAᵢ`.
fn means(batch: &Batch, w: &[f64]) -> (Mat<f64>, Mat<f64>) {
    let b: Vec<_> = (0..batch.frame.edges()).map(|e| batch.bt(e).transpose().to_owned()).collect();
    let a: Vec<_> = (0..batch.frame.edges()).map(|e| batch.a(e).to_owned()).collect();
    (weighted(&b, w), weighted(&a, w))
}

/// `d A⁺ A` by the pseudo-inverse of A itself.
fn projected(d: &Mat<f64>, a: &Mat<f64>) -> Mat<f64> {
    d * a.thin_svd().unwrap().pseudoinverse() * a
}

#[track_caller]
fn same(got: &Factors, want: &Mat<f64>, tolerance: f64) {
    let err = distance(product(got).as_ref(), want.as_ref());
    assert!(err <= tolerance, "{err:e} > {tolerance:e}");
}

#[test]
fn every_method_has_its_definition() {
    let x = three();
    let (b, a) = means(&x, &WEIGHTS);
    let mean = weighted(&updates(&x), &WEIGHTS);
    let own_a = |e: usize| x.a(e).to_owned();
    let own_b = |e: usize| x.bt(e).transpose().to_owned();
    same(&fuse(plain(Method::Fedavg), &x), &(&b * &a), 1e-14);
    same(&fuse(plain(Method::Mean), &x), &mean, 1e-14);
    same(&fuse(plain(Method::Ffa), &x), &(&b * own_a(0)), 1e-14);
    same(&fuse(plain(Method::FfaLsq), &x), &projected(&mean, &own_a(0)), 1e-12);
    same(&fuse(fedsa(Fedsa::Mean), &x), &(&b * &a), 1e-14);
    same(&fuse(fedsa(Fedsa::Client(2)), &x), &(own_b(2) * &a), 1e-14);
    same(&fuse(fedsa(Fedsa::Sum), &x), &(means(&x, &[1.0; 3]).0 * &a), 1e-14);
    same(&fuse(fedsa(Fedsa::Lsq), &x), &projected(&mean, &a), 1e-12);
    let sum = Fusion { lambda: 0.75, ..plain(Method::TaskArithmetic) };
    let ones = weigh(three(), &[1.0; 3]);
    same(&fuse(sum, &ones), &weighted(&updates(&x), &[0.75; 3]), 1e-14);

    let svd = mean.thin_svd().unwrap();
    for q in [1, 4, 7] {
        let best = Mat::from_fn(24, 18, |i, j| {
            (0..q).map(|k| svd.U()[(i, k)] * svd.S().column_vector()[k] * svd.V()[(j, k)]).sum()
        });
        let fused = Fusion { rank: Some(q), ..plain(Method::MeanSvd) }.fuse(&x, true).unwrap();
        same(&fused.factors, &best, 1e-12);
        assert_eq!(fused.factors.rank(), q);
        let kept = best.squared_norm_l2() / mean.squared_norm_l2();
        assert!((fused.energy_kept - kept).abs() <= 1e-12);
        same(&fuse(Fusion { rank: Some(q), ..plain(Method::Mean) }, &x), &best, 1e-12);
    }
    assert_eq!(fuse(plain(Method::MeanSvd), &x).rank(), 4, "the largest rank of the inputs");
}

#[test]
fn mixed_ranks_go_where_they_have_a_meaning() {
    let x = batch(&adapters(2, 24, 18, &[2, 5]));
    let mean = weighted(&updates(&x), &[0.5, 0.5]);
    same(&fuse(plain(Method::Mean), &x), &mean, 1e-14);
    same(&fuse(Fusion { rank: Some(7), ..plain(Method::MeanSvd) }, &x), &mean, 1e-12);
    assert_eq!(fuse(plain(Method::MeanSvd), &x).rank(), 5);
    for fusion in [plain(Method::Fedavg), plain(Method::Ffa), plain(Method::FfaLsq), fedsa(Fedsa::Sum)] {
        let text = fusion.fuse(&x, true).unwrap_err().to_string();
        assert!(text.contains("[2, 5]") && text.contains("mean and mean-svd"), "{text}");
    }
}

#[test]
fn a_stack_of_more_than_full_rank_is_refused_unless_it_is_merged() {
    let x = batch(&adapters(3, 9, 7, &[4, 4]));
    for method in [Method::Mean, Method::TaskArithmetic] {
        let text = plain(method).fuse(&x, true).unwrap_err().to_string();
        assert!(text.contains("rank 8") && text.contains("--rank") && text.contains("--merged"), "{text}");
    }
    let merged = plain(Method::Mean).fuse(&x, false).unwrap().factors;
    let mean = weighted(&updates(&x), &[0.5, 0.5]);
    same(&merged, &mean, 1e-14);
    same(&fuse(Fusion { rank: Some(7), ..plain(Method::Mean) }, &x), &mean, 1e-12);
}

#[test]
fn options_that_do_not_go_together_are_refused() {
    let text = Fusion::new(Method::Fedsa, None).unwrap_err().to_string();
    for choice in ["\n  mean ", "\n  client:J ", "\n  sum ", "\n  lsq "] {
        assert!(text.contains(choice), "{text}");
    }
    assert!(Fusion::new(Method::Fedavg, Some(Fedsa::Sum)).is_err());
    assert!(Fusion { rank: Some(0), ..plain(Method::Mean) }.check().is_err());
    assert!(Fusion { lambda: 2.0, ..plain(Method::Mean) }.check().is_err());
    assert!(Fusion { lambda: f64::NAN, ..plain(Method::TaskArithmetic) }.check().is_err());
    let mut gap = batch(&adapters(1, 9, 9, &[2, 2]));
    gap.frame.members = vec![0, 2];
    let missing = fedsa(Fedsa::Client(1)).fuse(&gap, true);
    assert!(missing.unwrap_err().to_string().contains("client:1"));
    for text in ["", "0", "-1", "energy:", "energy:0", "energy:1.5", "energy:NaN", "some"] {
        assert!(text.parse::<SharedRank>().is_err(), "{text}");
    }
    for text in ["", "client:", "client:-1", "client:x", "Mean"] {
        assert!(text.parse::<Fedsa>().is_err(), "{text}");
    }
    assert_eq!("energy:0.9".parse::<SharedRank>().unwrap(), SharedRank::Energy(0.9));
    assert_eq!("client:3".parse::<Fedsa>().unwrap(), Fedsa::Client(3));
}

/// Edges that kept rows 0..16 and 8..24 of B.
fn pruned_rows() -> (Batch, Vec<f64>) {
    let mut pairs = adapters(4, 24, 18, &[3, 3]);
    let kept = [0..16usize, 8..24];
    for ((b, _), kept) in pairs.iter_mut().zip(&kept) {
        *b = Mat::from_fn(24, 3, |o, k| if kept.contains(&o) { b[(o, k)] } else { 0.0 });
    }
    let mut x = batch(&pairs);
    x.frame.weights = vec![0.25, 0.75];
    x.frame.kept = kept.iter().map(|r| Kept { rows: Some(r.clone().collect()), columns: None }).collect();
    let covered = |o: usize| (0..2).filter(|&e| kept[e].contains(&o)).map(|e| [0.25, 0.75][e]).sum();
    (x, (0..24).map(covered).collect())
}

#[test]
fn present_coverage_is_a_mean_over_the_edges_that_kept_a_row() {
    let (x, covered) = pruned_rows();
    let mean = weighted(&updates(&x), &x.frame.weights);
    let want = Mat::from_fn(24, 18, |o, i| mean[(o, i)] / covered[o]);
    let present = |method| Fusion { coverage: Coverage::Present, ..plain(method) };
    same(&fuse(present(Method::Mean), &x), &want, 1e-14);
    let (b, a) = means(&x, &x.frame.weights);
    let b = Mat::from_fn(24, 3, |o, k| b[(o, k)] / covered[o]);
    same(&fuse(present(Method::Fedavg), &x), &(&b * &a), 1e-14);
    same(&fuse(plain(Method::Mean), &x), &mean, 1e-14);
    // Masks of rows do not make ffa stack.
    assert_eq!(present(Method::Ffa).fuse(&x, true).unwrap().variant, "ffa_ref(0)");
}

#[test]
fn ffa_with_different_column_masks_is_exact_by_stacking() {
    let mut pairs = adapters(5, 24, 18, &[3, 3]);
    let common = pairs[0].1.clone();
    let kept = [0..12usize, 6..18];
    for ((_, a), kept) in pairs.iter_mut().zip(&kept) {
        *a = Mat::from_fn(3, 18, |k, i| if kept.contains(&i) { common[(k, i)] } else { 0.0 });
    }
    let kept = kept.iter().map(|r| Kept { rows: None, columns: Some(r.clone().collect()) }).collect();
    let mut x = frozen(batch(&pairs));
    x.frame.kept = kept;
    check_frozen(&x).unwrap();
    let fused = plain(Method::Ffa).fuse(&x, true).unwrap();
    let mean = weighted(&updates(&x), &x.frame.weights);
    assert_eq!((fused.variant.as_str(), fused.factors.rank()), ("stacked", 6));
    same(&fused.factors, &mean, 1e-14);
    // The frozen A is put together from both edges' columns.
    same(&fuse(plain(Method::FfaLsq), &x), &projected(&mean, &common), 1e-12);

    let equal = frozen(batch(&[(pairs[0].0.clone(), common.clone()), (pairs[1].0.clone(), common)]));
    let fused = plain(Method::Ffa).fuse(&equal, true).unwrap();
    assert_eq!(fused.variant, "ffa_init");
    same(&fused.factors, &weighted(&updates(&equal), &equal.frame.weights), 1e-14);

    let liars = frozen(three());
    assert!(check_frozen(&liars).unwrap_err().to_string().contains("adapters 0 and 1"));
}

#[test]
fn a_frozen_a_stays_exact_after_conflict_resolution() {
    let mut pairs = adapters(6, 24, 18, &[3, 3]);
    pairs[1].1 = pairs[0].1.clone();
    let x = frozen(batch(&pairs));
    let (resolved, _) = dense::resolve(&cpu(), &x, &LoraCr::default());
    let (want, _) = dense::lora_cr(&updates(&x), SharedRank::All, Gate::Paper);
    same(&fuse(plain(Method::Ffa), &resolved), &weighted(&want, &x.frame.weights), 1e-11);
}

fn rounded(f: &Factors) -> Factors {
    let round = |x: &f64| *x as f32 as f64;
    Factors::new(f.bt().to_owned().map(round), f.a().to_owned().map(round)).unwrap()
}

#[test]
fn the_certificate_measures_what_dense_norms_measure() {
    let x = three();
    let known = compared(&x);
    let d = updates(&x);
    let mean = weighted(&d, &WEIGHTS);
    for method in [Method::Fedavg, Method::Mean, Method::MeanSvd, Method::Ffa] {
        let expected = fuse(plain(method), &x);
        let got = rounded(&expected);
        let m = measure(&got, &Made::Factors(expected.clone()), &x, &known).unwrap();
        let want = distance(product(&got).as_ref(), product(&expected).as_ref());
        assert!(want > 1e-9 && (m.error / want - 1.0).abs() <= 1e-6, "{method}: {} {want}", m.error);
        let want = distance(product(&got).as_ref(), mean.as_ref());
        assert!((m.distance_to_mean - want).abs() <= 2e-8, "{method}: {} {want}", m.distance_to_mean);
        let nearest = weighted(&d, &m.effective_scale);
        let residual = product(&got) - &nearest;
        for d in &d {
            let dot: f64 = (0..18).map(|j| (0..24).map(|i| residual[(i, j)] * d[(i, j)]).sum::<f64>()).sum();
            assert!(dot.abs() <= 1e-9 * d.squared_norm_l2(), "{method}: not the least-squares shares");
        }
    }
    let exact = fuse(plain(Method::Mean), &x);
    let m = measure(&exact, &Made::Factors(exact.clone()), &x, &known).unwrap();
    assert_eq!(m.error, 0.0);
    for (got, want) in m.effective_scale.iter().zip(WEIGHTS) {
        assert!((got - want).abs() <= 1e-10);
    }
    // A wrong scale is seen, and so are rows beyond the expected rank.
    let expected = fuse(plain(Method::Fedavg), &x);
    let made = Made::Factors(expected.clone());
    let double = expected.scaled(Some(&[2.0; 24]), None);
    assert!((measure(&double, &made, &x, &known).unwrap().error - 1.0).abs() <= 1e-12);
    let more = fuse(plain(Method::Mean), &x);
    let want = distance(product(&more).as_ref(), product(&expected).as_ref());
    assert!((measure(&more, &made, &x, &known).unwrap().error - want).abs() <= 1e-10);
}

/// The only module's way through a recipe.
fn outcome(resolve: Option<LoraCr>, fusion: Fusion, x: &Batch) -> Outcome {
    Recipe { resolve, fusion }.run(&cpu(), std::slice::from_ref(x), false).unwrap().remove(0)
}

/// The methods whose factors are linear in the updates'.
fn linear() -> Vec<Fusion> {
    use Method::*;
    let mut all = vec![Fusion::new(Fedsa, Some(anabranch::fuse::options::Fedsa::Client(1))).unwrap()];
    all.push(Fusion::new(Fedsa, Some(anabranch::fuse::options::Fedsa::Sum)).unwrap());
    all.extend([Fedavg, Mean, Ffa, Fedex, TaskArithmetic, Tsv, IsoC, PeftLinear, PeftCat].map(plain));
    all
}

#[test]
fn the_certificate_measures_the_same_by_grams_and_without() {
    let mixed = weigh(batch(&adapters(2, 24, 18, &[4, 2, 5])), &WEIGHTS);
    let both = LoraCr { side: Side::Both, restore: Restore::Client, ..LoraCr::default() };
    for (x, resolve) in
        [three(), mixed].iter().flat_map(|x| [None, Some(LoraCr::default()), Some(both)].map(|r| (x, r)))
    {
        for fusion in linear() {
            let method = fusion.method;
            if method.needs_equal_ranks() && x.frame.ranks()[0] != x.frame.ranks()[1] {
                continue;
            }
            let outcome = outcome(resolve, fusion, x);
            assert!(matches!(outcome.made, Made::Pair(_)), "{method}");
            let expected = outcome.made.factors(x).unwrap();
            // The resolved factors are not formed on the way.
            let resolved = resolve.map_or_else(|| x.clone(), |r| dense::resolve(&cpu(), x, &r).0);
            same(&expected, &product(&fuse(fusion, &resolved)), 1e-10);
            let longer = expected.scaled(None, Some(&[1.5; 18]));
            let whole = Made::Factors(expected.clone());
            for (got, error) in [(rounded(&expected), 1e-7), (expected.clone(), 0.0), (longer, 0.5)] {
                let [by_grams, without] =
                    [&outcome.made, &whole].map(|made| measure(&got, made, x, &outcome.compared).unwrap());
                assert!(without.error <= error + 1e-12, "{method}: {}", without.error);
                assert!((by_grams.error - without.error).abs() <= 1e-6 * without.error, "{method}");
                assert!((by_grams.distance_to_mean - without.distance_to_mean).abs() <= 2e-7, "{method}");
                // A difference is known to the digits of an f32.
                let near = 1e-10 + 1e-6 * error;
                for (a, b) in by_grams.effective_scale.iter().zip(&without.effective_scale) {
                    assert!((a - b).abs() <= near, "{method}: {a} {b}");
                }
            }
        }
    }
    // More ranks than rows: no Grams, and the resolved factors themselves.
    let tall = batch(&adapters(3, 10, 30, &[5, 5, 4]));
    for method in [Method::Mean, Method::Tsv, Method::IsoC] {
        let outcome = outcome(Some(LoraCr::default()), plain(method), &tall);
        let resolved = dense::resolve(&cpu(), &tall, &LoraCr::default()).0;
        let want = plain(method).fuse(&resolved, false).unwrap().factors;
        let Made::Factors(got) = &outcome.made else { panic!("{method}: no factors") };
        same(got, &product(&want), 1e-10);
        let m = measure(got, &outcome.made, &tall, &outcome.compared).unwrap();
        let mean = weighted(&updates(&resolved), &tall.frame.weights);
        let want = distance(product(got).as_ref(), mean.as_ref());
        assert!((m.distance_to_mean - want).abs() <= 1e-7, "{method}: {} {want}", m.distance_to_mean);
    }
    // A truncated result is not linear.
    let cut = Fusion { rank: Some(2), ..plain(Method::Mean) };
    assert!(matches!(outcome(None, cut, &three()).made, Made::Factors(_)));
}

/// More numbers than are worked on by one thread: no Grams are kept, and the resolved factors are still not formed.
#[test]
fn a_large_module_is_resolved_by_maps_as_by_factors() {
    let x = weigh(batch(&adapters(9, 280_000, 280_000, &[30, 30])), &[0.7, 0.3]);
    assert!(x.frame.is_large());
    for (side, restore) in [(Side::Left, Restore::None), (Side::Right, Restore::Client)] {
        let resolve = Some(LoraCr { side, restore, ..LoraCr::default() });
        let outcome = outcome(resolve, plain(Method::Fedavg), &x);
        assert!(matches!(outcome.made, Made::Pair(_)), "{side:?}");
        let recipe = Recipe { resolve, fusion: plain(Method::Fedavg) };
        let known = recipe.compare(&cpu(), std::slice::from_ref(&x)).unwrap().remove(0);
        let whole = fuse(plain(Method::Fedavg), known.updates(&x));
        let got = outcome.made.factors(&x).unwrap();
        for (got, want) in [(got.bt(), whole.bt()), (got.a(), whole.a())] {
            assert!((got - want).norm_l2() <= 1e-9 * want.norm_l2(), "{side:?}");
        }
        let (by_maps, by_factors) =
            (outcome.compared.resolved.as_ref().unwrap(), known.resolved.as_ref().unwrap());
        let off = (&by_maps.products - &by_factors.products).norm_l2();
        assert!(off <= 1e-9 * by_factors.products.norm_l2(), "{side:?}: {off}");
        assert!((by_maps.score.conflict_mean - by_factors.score.conflict_mean).abs() <= 1e-9);
        let written = rounded(&whole);
        let m = measure(&written, &outcome.made, &x, &outcome.compared).unwrap();
        let want = measure(&written, &Made::Factors(whole), &x, &known).unwrap();
        assert!(
            want.error > 1e-9 && (m.error - want.error).abs() <= 1e-6 * want.error,
            "{side:?}: {}",
            m.error
        );
        assert!((m.distance_to_mean - want.distance_to_mean).abs() <= 1e-7, "{side:?}");
    }
}

#[test]
fn a_result_is_written_and_measured_a_few_columns_at_a_time() {
    // More columns than are worked on at once, and no multiple of it.
    let x = weigh(batch(&adapters(8, 1030, 517, &[3, 3, 3])), &WEIGHTS);
    let svd = plain(Method::MeanSvd);
    for (resolve, fusion) in
        linear().into_iter().chain([svd]).flat_map(|f| [(None, f), (Some(LoraCr::default()), f)])
    {
        let (method, outcome) = (fusion.method, outcome(resolve, fusion, &x));
        let expected = outcome.made.factors(&x).unwrap();
        let rank = expected.rank();
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let written = outcome.write(&x, dtype).unwrap();
            let (mut a, mut b) = (Vec::new(), Vec::new());
            convert::narrow_f64(&mut a, &expected.a_rows(), dtype);
            convert::narrow_f64(&mut b, expected.b_rows(), dtype);
            let wide = |bytes: &[u8]| {
                let mut out = vec![0.0; bytes.len() / dtype.size()];
                convert::widen_f64(&mut out, bytes, dtype);
                out
            };
            // A column's bytes may depend on where it stands by rounding in f64, which shows at a tie only.
            let far = |x: &[u8], y: &[u8]| wide(x).iter().zip(wide(y)).filter(|(x, y)| **x != *y).count();
            assert_eq!((written.a.len(), written.b.len()), (a.len(), b.len()));
            assert!(far(&written.a, &a) + far(&written.b, &b) <= 2, "{method} {dtype}");
            let got =
                Factors::new(Rows::new(wide(&written.b), rank), Rows::from_rows(&wide(&written.a), rank))
                    .unwrap();
            let m = measure(&got, &Made::Factors(expected.clone()), &x, &outcome.compared).unwrap();
            let c = written.certificate;
            assert!((c.error - m.error).abs() <= 1e-6 * m.error, "{method} {dtype}: {} {}", c.error, m.error);
            let least = if dtype == DType::F32 { 1e-9 } else { 1e-5 };
            assert!(c.error > least && c.error <= 1e-2, "{method} {dtype}: {}", c.error);
            assert!((c.distance_to_mean - m.distance_to_mean).abs() <= 2e-7, "{method} {dtype}");
            assert_eq!(c.rank, rank);
        }
    }
    // What no dtype holds is refused.
    let huge = weigh(batch(&adapters(8, 30, 20, &[3, 3, 3])), &[1e39, 1.0, 1.0]);
    let e = outcome(None, plain(Method::TaskArithmetic), &huge).write(&huge, DType::F32).unwrap_err();
    assert!(e.to_string().contains("too large for F32"), "{e}");
}

#[test]
fn the_certificate_after_resolution_compares_with_the_resolved_mean() {
    let x = three();
    let (resolved, known) = dense::resolve(&cpu(), &x, &LoraCr::default());
    let expected = fuse(plain(Method::Fedavg), &resolved);
    let m = measure(&expected, &Made::Factors(expected.clone()), &x, &known).unwrap();
    let mean = weighted(&updates(&resolved), &WEIGHTS);
    let want = distance(product(&expected).as_ref(), mean.as_ref());
    assert!((m.distance_to_mean - want).abs() <= 1e-10);
}

#[test]
fn conflict_scores_are_those_of_the_dense_updates() {
    let x = three();
    let d = updates(&x);
    let options = LoraCr::default();
    let module = |layer, target| {
        let module = Module { layer, target };
        let mut x = x.clone();
        x.frame.module = module;
        module_conflicts(&cpu(), &[x], &options).unwrap().remove(0)
    };
    let m = module(3, Target::Up);
    let score = |directions: &[dense::Direction]| {
        let sigma: f64 = directions.iter().map(|d| d.sigma).sum();
        let mean = directions.iter().map(|d| d.conflict).sum::<f64>() / directions.len() as f64;
        (mean, directions.iter().map(|d| d.sigma * d.conflict).sum::<f64>() / sigma)
    };
    let (after, before) = dense::lora_cr(&d, SharedRank::All, Gate::Paper);
    let (_, again) = dense::lora_cr(&after, SharedRank::All, Gate::Paper);
    for (got, want) in [(m.before, score(&before)), (m.after, score(&again))] {
        assert!((got.conflict_mean - want.0).abs() <= 1e-9 && (got.conflict_weighted - want.1).abs() <= 1e-9);
    }
    let energy = |d: &[Mat<f64>]| d.iter().map(|d| d.squared_norm_l2()).sum::<f64>();
    assert!((m.energy_kept - energy(&after) / energy(&d)).abs() <= 1e-11);
    assert!((m.norms[1] / d[1].norm_l2() - 1.0).abs() <= 1e-12);
    assert!((m.norms_after[2] / after[2].norm_l2() - 1.0).abs() <= 1e-10);
    let dot: f64 = (0..18).map(|j| (0..24).map(|i| d[0][(i, j)] * d[1][(i, j)]).sum::<f64>()).sum();
    assert!((m.cosines[0][1] - dot / d[0].norm_l2() / d[1].norm_l2()).abs() <= 1e-12);

    let report = ConflictReport::new(3, vec![m.clone(), module(0, Target::Q), module(3, Target::Down)]);
    assert_eq!(report.layers.iter().map(|l| l.layer).collect::<Vec<_>>(), [0, 3]);
    assert!((report.before.conflict_mean - m.before.conflict_mean).abs() <= 1e-15);
    assert!((report.norms[0] - 3.0_f64.sqrt() * m.norms[0]).abs() <= 1e-9);
    assert!((report.cosines[0][1] - m.cosines[0][1]).abs() <= 1e-12);
    let json = serde_json::to_value(&report).unwrap();
    assert!(json["modules"][0]["before"]["conflict_weighted"].is_f64());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    #[test]
    fn truncation_keeps_the_largest_singular_values(
        seed in any::<u64>(), o in 1usize..10, i in 1usize..10, r in 1usize..12, q in 1usize..12,
    ) {
        let pairs: Vec<Pair> = adapters(seed, o, i, &[r]);
        let f = batch(&pairs).stack;
        let full = product(&f);
        let s = full.singular_values().unwrap();
        let lost: f64 = s.iter().skip(q).map(|s| s * s).sum::<f64>().sqrt();
        let (cut, kept) = truncate(f, q).unwrap();
        prop_assert_eq!(cut.rank(), if q >= r { r } else { q.min(o).min(i) });
        let err = (product(&cut) - &full).norm_l2();
        prop_assert!((err - lost).abs() <= 1e-11 * full.norm_l2(), "{err} {lost}");
        prop_assert!((1.0 - kept - lost * lost / full.squared_norm_l2()).abs() <= 1e-11);
    }

    #[test]
    fn the_mean_is_exact_whatever_the_shapes(
        seed in any::<u64>(), o in 1usize..10, i in 1usize..10, ranks in prop::collection::vec(1usize..6, 1..5),
    ) {
        let x = batch(&adapters(seed, o, i, &ranks));
        let fused = plain(Method::Mean).fuse(&x, false).unwrap();
        let mean = weighted(&updates(&x), &x.frame.weights);
        prop_assert!(distance(product(&fused.factors).as_ref(), mean.as_ref()) <= 1e-13);
    }
}
