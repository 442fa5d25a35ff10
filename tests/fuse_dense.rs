//! Every fusion method from factors against the same method on dense updates, at odd, tall, wide and over-full shapes;
//! what must hold whatever the numbers; the certificate of every one.

mod dense;

use std::path::Path;

use anabranch::checkpoint::input_grams::{InputGram, InputGrams};
use anabranch::checkpoint::module::{Module, Source, Target};
use anabranch::checkpoint::weights::OpenOptions;
use anabranch::fuse::elementwise::Sparse;
use anabranch::fuse::measure::measure;
use anabranch::fuse::options::{DensityOf, Fedsa, Method};
use anabranch::fuse::ties::Trim;
use anabranch::fuse::{Batch, Factors, Fusion, Kept, LoraCr, Recipe};
use anabranch::tensor::DType;
use dense::methods as plain;
use dense::{Pair, Random, adapters, batch, cpu, dense as product, distance, updates, weighted};
use faer::{Mat, Scale};

/// O, I, ranks, weights.
type Shape = (usize, usize, &'static [usize], &'static [f64]);

/// Odd, tall, wide, of mixed ranks, and with P above O, above I and above both.
const SHAPES: [Shape; 9] = [
    (24, 18, &[4, 4, 4], &[0.5, 0.2, 0.3]),
    (37, 11, &[3, 3], &[0.5, 0.5]),
    (7, 41, &[2, 2], &[0.25, 0.75]),
    (29, 31, &[1, 5, 2], &[0.2, 0.3, 0.5]),
    (5, 23, &[4, 4], &[0.5, 0.5]),
    (23, 5, &[4, 4], &[0.6, 0.4]),
    (6, 7, &[3, 2, 4], &[0.3, 0.3, 0.4]),
    (1, 9, &[1, 1], &[0.5, 0.5]),
    (13, 1, &[1, 1, 1], &[0.5, 0.25, 0.25]),
];
const BOUND: f64 = 1e-6;

fn fusion(method: Method) -> Fusion {
    Fusion::new(method, (method == Method::Fedsa).then_some(Fedsa::Sum)).unwrap()
}

/// The methods whose result has factors: those on entries have tests of their own.
fn with_factors() -> impl Iterator<Item = Method> {
    Method::ALL.iter().copied().filter(|m| !m.is_elementwise())
}

fn knots_ties(density: f64) -> Fusion {
    let sparse = Some(Sparse::Trim(Trim { density, ..Trim::default() }));
    Fusion { sparse, ..fusion(Method::KnotsTies) }
}

fn weigh(mut x: Batch, weights: &[f64]) -> Batch {
    x.frame.weights = weights.to_vec();
    x
}

fn fused(fusion: Fusion, x: &Batch) -> Factors {
    fusion.fuse(x, false).unwrap().factors
}

#[track_caller]
fn same(got: &Factors, want: &Mat<f64>, what: &str) {
    let err = distance(product(got).as_ref(), want.as_ref());
    println!("{what}: {err:.1e}");
    assert!(err <= BOUND, "{what}: {err:e}");
}

/// `XᵀX / T` of T random inputs of width n, channel n / 2 always zero.
fn gram(seed: u64, n: usize, tokens: usize) -> Mat<f64> {
    let mut random = Random(seed);
    let x = random.matrix(tokens, n);
    let own: Vec<f64> =
        (0..n).map(|j| if n > 2 && j == n / 2 { 0.0 } else { 1.0 + 0.3 * random.next() }).collect();
    let x = Mat::from_fn(tokens, n, |t, j| x[(t, j)] * own[j] + 0.4 * own[j] * x[(t, 0)]);
    // As the file will hold it.
    let g = Scale(1.0 / tokens as f64) * (x.transpose() * &x);
    Mat::from_fn(n, n, |i, j| f64::from(g[(i.min(j), i.max(j))] as f32))
}

/// A folder with one Gram, of the input of layer 3's gate and up.
fn write_gram(dir: &Path, g: &Mat<f64>) {
    std::fs::create_dir_all(dir).unwrap();
    dense::write_grams(dir, 7, &[(3, Source::GateUp, dense::upper(g))]);
}

fn read_gram(g: &Mat<f64>) -> InputGram {
    let dir = tempfile::tempdir().unwrap();
    write_gram(dir.path(), g);
    let grams = InputGrams::open(dir.path(), OpenOptions::default()).unwrap();
    assert_eq!(grams.tokens, 7);
    let gram = grams.of(Module { layer: 3, target: Target::Up }, g.nrows()).unwrap();
    gram.check().unwrap();
    gram
}

/// A batch with input Grams, and the Grams.
fn with_grams(x: Batch, seed: u64) -> (Batch, Vec<Mat<f64>>) {
    let n = x.frame.size.1;
    // More tokens than the width, and fewer.
    let grams: Vec<_> =
        (0..x.frame.edges()).map(|e| gram(seed + e as u64, n, [3 * n + 1, n.div_ceil(2)][e % 2])).collect();
    let read: Vec<_> = grams.iter().map(read_gram).collect();
    (x.with_inputs(read), grams)
}

#[test]
fn methods_from_factors_are_the_dense_ones() {
    for (n, &(o, i, ranks, w)) in SHAPES.iter().enumerate() {
        let what = |method| format!("{method} {o} x {i}, ranks {ranks:?}");
        let x = weigh(batch(&adapters(n as u64 + 1, o, i, ranks)), w);
        let d = updates(&x);
        let mean = weighted(&d, w);
        for lambda in [1.0, -1.75] {
            let with = |method| Fusion { lambda, ..fusion(method) };
            let want = plain::tsv(&d, w, lambda);
            same(&fused(with(Method::Tsv), &x), &want, &what(Method::Tsv));
            // From Grams, where P is not above O.
            let recipe = Recipe { resolve: None, fusion: with(Method::Tsv) };
            let outcome = recipe.run(&cpu(), std::slice::from_ref(&x), false).unwrap().remove(0);
            same(&outcome.made.factors(&x).unwrap(), &want, &what(Method::Tsv));
            same(&fused(with(Method::IsoC), &x), &plain::iso_c(&d, w, lambda), &what(Method::IsoC));
            for density in [0.2, 0.5, 1.0] {
                let got = fused(Fusion { lambda, ..knots_ties(density) }, &x);
                same(&got, &plain::knots_ties(&d, w, density, lambda), &what(Method::KnotsTies));
            }
            let (x, grams) = with_grams(x.clone(), 100 * n as u64);
            let got = fused(with(Method::CatMerging), &x);
            same(&got, &plain::cat_merging(&d, w, &grams, lambda), &what(Method::CatMerging));
        }
        same(&fused(fusion(Method::Fedex), &x), &mean, &what(Method::Fedex));
        same(&fused(fusion(Method::PeftCat), &x), &mean, &what(Method::PeftCat));
        let (with, grams) = with_grams(x.clone(), 100 * n as u64);
        same(&fused(fusion(Method::Regmean), &with), &plain::regmean(&d, w, &grams), &what(Method::Regmean));
        let (u, s, v) = plain::svd(mean.as_ref());
        for q in [1, 2, 5] {
            let k = q.min(s.len());
            let cut = |m: &Mat<f64>| m.subcols(0, k).to_owned();
            let want = plain::compose(&cut(&u), &s[..k], &cut(&v));
            let got = Fusion { rank: Some(q), ..fusion(Method::PeftSvd) }.fuse(&x, false).unwrap();
            same(&got.factors, &want, &what(Method::PeftSvd));
            let kept = want.squared_norm_l2() / mean.squared_norm_l2();
            assert!((got.energy_kept - kept).abs() <= 1e-12, "{}", got.energy_kept);
            // PEFT's form: A has orthonormal rows.
            let rows = got.factors.a() * got.factors.a().transpose();
            assert!((rows - Mat::<f64>::identity(k, k)).norm_max() <= 1e-12);
        }
    }
}

#[test]
fn fedex_is_fedavgs_adapter_and_a_residual() {
    let x = weigh(batch(&adapters(5, 24, 18, &[3, 3, 3])), &[0.5, 0.2, 0.3]);
    let (whole, mean) = (fused(fusion(Method::Fedex), &x), fused(fusion(Method::Fedavg), &x));
    assert_eq!(whole.rank(), 9);
    let (bt, a) = (whole.bt().subrows(0, 3) - mean.bt(), whole.a().subrows(0, 3) - mean.a());
    assert!(bt.norm_max() <= 1e-15 && a.norm_max() <= 1e-15);
    let residual = whole.b().subcols(3, 6) * whole.a().subrows(3, 6);
    let want = weighted(&updates(&x), &x.frame.weights) - product(&mean);
    assert!(distance(residual.as_ref(), want.as_ref()) <= 1e-13);
}

/// Scales that differ, one of them zero and one negative, as in the adapters' files.
#[test]
fn peft_types_take_the_scale_once() {
    let files = adapters(8, 19, 14, &[3, 3, 3, 3]);
    let (w, s) = ([0.4, 0.3, 0.2, 0.1], [2.0, 0.5, 0.0, -1.5]);
    let folded: Vec<Pair> = files.iter().zip(s).map(|((b, a), s)| (Scale(s) * b, a.clone())).collect();
    let mut x = weigh(batch(&folded), &w);
    x.frame.scales = s.to_vec();
    same(&fused(fusion(Method::PeftLinear), &x), &plain::peft_linear(&files, &w, &s), "peft-linear");
    let cat = fused(fusion(Method::PeftCat), &x);
    same(&cat, &weighted(&updates(&x), &w), "peft-cat");
    // B is the file's.
    let first = Mat::from_fn(19, 3, |o, k| cat.bt()[(k, o)]) - &files[0].0;
    assert!(first.norm_max() <= 1e-15);
    // E times FedAvg, where scales are equal and weights 1/E.
    let even = weigh(batch(&files), &[0.25; 4]);
    let four = Scale(4.0) * product(&fused(fusion(Method::Fedavg), &even));
    same(&fused(fusion(Method::PeftLinear), &even), &four, "peft-linear, equal");
    let mixed = batch(&adapters(8, 9, 9, &[2, 3]));
    let text = fusion(Method::PeftLinear).fuse(&mixed, true).unwrap_err().to_string();
    assert!(text.contains("[2, 3]") && text.contains("mean and mean-svd"), "{text}");
}

#[test]
fn lego_finds_the_best_clusters() {
    for (seed, ranks, k, w) in [
        (1, &[2, 2][..], 2, &[0.5, 0.5][..]),
        (2, &[3, 3], 3, &[0.5, 0.5]),
        (3, &[2, 3], 2, &[0.7, 0.3]),
        (4, &[2, 2, 2], 4, &[0.2, 0.3, 0.5]),
        (5, &[3, 2], 1, &[0.5, 0.5]),
        (6, &[2, 2], 4, &[0.5, 0.5]),
    ] {
        let x = weigh(batch(&adapters(seed, 11, 13, ranks)), w);
        let units: Vec<_> = (0..x.frame.rank())
            .map(|p| {
                let row = |m: faer::MatRef<'_, f64>| (0..m.ncols()).map(|j| m[(p, j)]).collect::<Vec<_>>();
                (row(x.stack.bt()), row(x.stack.a()))
            })
            .collect();
        let r = *ranks.iter().max().unwrap();
        let want = plain::lora_lego(&units, &x.frame.along_rank(w), k, r);
        for seed in [0, 1, 77] {
            let got = Fusion { clusters: Some(k), seed, ..fusion(Method::LoraLego) };
            same(&fused(got, &x), &want, &format!("lora-lego {ranks:?} into {k}"));
        }
        let default = fusion(Method::LoraLego).fuse(&x, true).unwrap();
        assert_eq!(default.factors.rank(), r);
    }
    let x = batch(&adapters(1, 9, 9, &[2, 2]));
    let text = Fusion { clusters: Some(5), ..fusion(Method::LoraLego) }.fuse(&x, true).unwrap_err();
    assert!(text.to_string().contains("4 units"), "{text}");
}

/// A share of all entries is twice the share of those that a pruning of half the columns left.
#[test]
fn the_density_of_knots_ties_is_of_what_pruning_left_or_of_all() {
    let mut pairs = adapters(18, 17, 12, &[3, 3]);
    for (_, a) in &mut pairs {
        *a = Mat::from_fn(3, 12, |k, i| if i.is_multiple_of(2) { a[(k, i)] } else { 0.0 });
    }
    let mut x = batch(&pairs);
    x.frame.kept = vec![Kept { rows: None, columns: Some((0..12).step_by(2).collect()) }; 2];
    let made = |density, of| {
        let sparse = Some(Sparse::Trim(Trim { density, of, ..Trim::default() }));
        product(&fused(Fusion { sparse, ..knots_ties(density) }, &x))
    };
    assert_eq!(made(0.25, DensityOf::Full), made(0.5, DensityOf::Support));
    assert_ne!(made(0.25, DensityOf::Full), made(0.25, DensityOf::Support));
}

/// Every method, input Grams in place.
fn each(x: &Batch, mut check: impl FnMut(Method, Mat<f64>)) {
    for method in with_factors() {
        let x = if method.needs_input_grams() { with_grams(x.clone(), 7).0 } else { x.clone() };
        let got = fused(fusion(method), &x);
        assert!(got.is_finite(), "{method}");
        check(method, product(&got));
    }
}

#[test]
fn one_adapter_alone_is_itself() {
    let x = batch(&adapters(11, 17, 12, &[3]));
    let d = updates(&x).remove(0);
    each(&x, |method, got| {
        let want = match method {
            Method::IsoC => plain::iso_c(std::slice::from_ref(&d), &[1.0], 1.0),
            Method::KnotsTies => plain::knots_ties(std::slice::from_ref(&d), &[1.0], 0.2, 1.0),
            // Channel 6 has no input: what an update does to it cannot be seen.
            Method::Regmean => Mat::from_fn(17, 12, |o, i| if i == 6 { 0.0 } else { d[(o, i)] }),
            _ => d.clone(),
        };
        assert!(distance(got.as_ref(), want.as_ref()) <= 1e-9, "{method}");
    });
    same(&fused(knots_ties(1.0), &x), &d, "knots-ties, all entries");
}

#[test]
fn equal_adapters_are_fused_to_themselves() {
    let pair = adapters(12, 17, 12, &[3]).remove(0);
    let x = batch(&[pair.clone(), pair]);
    let d = updates(&x).remove(0);
    each(&x, |method, got| {
        let want = match method {
            Method::TaskArithmetic | Method::PeftLinear | Method::Fedsa => Scale(2.0) * &d,
            // Two equal halves share one set of singular vectors: each gets a half of it.
            Method::Tsv => Scale(0.5) * &d,
            Method::IsoC => plain::iso_c(std::slice::from_ref(&d), &[1.0], 1.0),
            Method::KnotsTies => plain::knots_ties(std::slice::from_ref(&d), &[1.0], 0.2, 1.0),
            Method::Regmean => Mat::from_fn(17, 12, |o, i| if i == 6 { 0.0 } else { d[(o, i)] }),
            // Inputs differ, and so does what is projected out: see the dense definition.
            Method::CatMerging => return,
            _ => d.clone(),
        };
        // TaskArithmetic's weights are given, here 1/2 each.
        let want = if method == Method::TaskArithmetic { d.clone() } else { want };
        assert!(distance(got.as_ref(), want.as_ref()) <= 1e-9, "{method}");
    });
    // Equal inputs: no update does more to the other's than to its own, so nothing is projected out.
    let gram = read_gram(&gram(3, 12, 40));
    let same_inputs = x.with_inputs(vec![gram.clone(), gram]);
    same(&fused(fusion(Method::CatMerging), &same_inputs), &d, "cat-merging");
}

#[test]
fn zero_adapters_change_nothing_but_the_weight() {
    let one = adapters(13, 17, 12, &[3]).remove(0);
    let zero = (Mat::zeros(17, 3), Mat::zeros(3, 12));
    let x = batch(&[one.clone(), zero.clone()]);
    let d = updates(&x).remove(0);
    each(&x, |method, got| {
        let want = match method {
            Method::Fedavg => Scale(0.25) * &d,
            Method::Fedsa => Scale(0.5) * &d,
            Method::IsoC => plain::iso_c(std::slice::from_ref(&d), &[0.5], 1.0),
            Method::KnotsTies => plain::knots_ties(std::slice::from_ref(&d), &[1.0], 0.2, 1.0),
            Method::Ffa | Method::FfaLsq | Method::Mean | Method::MeanSvd | Method::TaskArithmetic => {
                Scale(0.5) * &d
            }
            // B̄ Ā of half an adapter is a quarter, its square roots' product a half.
            Method::PeftLinear => Scale(0.5) * &d,
            Method::LoraLego => d.clone(),
            Method::Regmean | Method::CatMerging => return,
            _ => Scale(0.5) * &d,
        };
        assert!(distance(got.as_ref(), want.as_ref()) <= 1e-9, "{method}");
    });
    let none = batch(&[zero.clone(), zero]);
    each(&none, |method, got| assert_eq!(got.norm_max(), 0.0, "{method}"));
}

/// Whatever the updates' size, and whether or not conflicts are resolved or the result is cut, there are factors to write.
#[test]
fn zero_updates_are_written_as_zeros() {
    for (o, i) in [(17, 12), (4, 30), (30, 4)] {
        let x = batch(&[(Mat::zeros(o, 3), Mat::zeros(3, i)), (Mat::zeros(o, 3), Mat::zeros(3, i))]);
        for method in with_factors().filter(|m| !m.needs_input_grams()) {
            for (resolve, rank) in [(None, None), (Some(LoraCr::default()), None), (None, Some(1))] {
                let recipe = Recipe { resolve, fusion: Fusion { rank, ..fusion(method) } };
                let outcome = recipe.run(&cpu(), std::slice::from_ref(&x), false).unwrap().remove(0);
                let written = outcome.write(&x, DType::F32).unwrap();
                let rank = outcome.made.rank(&x.frame);
                assert!(
                    rank > 0 && (written.a.len(), written.b.len()) == (4 * rank * i, 4 * rank * o),
                    "{method}"
                );
                let factors = outcome.made.factors(&x).unwrap();
                assert!(factors.size() == (o, i) && product(&factors).norm_max() == 0.0, "{method}");
                assert_eq!(written.certificate.error, 0.0, "{method}");
                assert_eq!(outcome.certify(&x, &factors).unwrap().error, 0.0, "{method}");
            }
        }
    }
}

#[test]
fn exact_negations_cancel_or_are_said_to_be_what_they_are() {
    let (b, a) = adapters(14, 17, 12, &[3]).remove(0);
    let x = batch(&[(b.clone(), a.clone()), (Scale(-1.0) * b, a)]);
    let d = updates(&x).remove(0);
    let size = d.norm_l2();
    each(&x, |method, got| match method {
        // The sign of a zero sum is +: the positive entries of both stay.
        Method::KnotsTies => {
            let want = plain::knots_ties(&updates(&x), &[0.5, 0.5], 0.2, 1.0);
            assert!(distance(got.as_ref(), want.as_ref()) <= 1e-9, "{method}");
        }
        // Inputs differ, so the two are not weighed alike.
        Method::Regmean | Method::CatMerging => {}
        // Which units share a cluster is a matter of all of them.
        Method::LoraLego => {}
        _ => assert!(got.norm_l2() <= 1e-9 * size, "{method}: {}", got.norm_l2() / size),
    });
}

/// One adapter a billion times larger than the other: finite, and the larger one's where both are summed.
#[test]
fn a_giant_beside_an_adapter() {
    let mut pairs = adapters(15, 17, 12, &[3, 3]);
    pairs[0].0 = Scale(1e9) * &pairs[0].0;
    let x = batch(&pairs);
    let d = updates(&x);
    each(&x, |method, got| {
        let (want, bound) = match method {
            Method::Mean | Method::Fedex | Method::PeftCat | Method::TaskArithmetic => {
                (weighted(&d, &[0.5, 0.5]), 1e-12)
            }
            Method::Tsv => (plain::tsv(&d, &[0.5, 0.5], 1.0), 1e-9),
            // The small one has no direction that is more than 1e-6 of the largest.
            Method::IsoC => (plain::iso_c(&d, &[0.5, 0.5], 1.0), 1e-7),
            Method::KnotsTies => (plain::knots_ties(&d, &[0.5, 0.5], 0.2, 1.0), 1e-7),
            _ => return,
        };
        assert!(distance(got.as_ref(), want.as_ref()) <= bound, "{method}");
    });
}

#[test]
fn every_methods_certificate_is_exact_and_sees_a_wrong_scale() {
    let x = weigh(batch(&adapters(16, 26, 19, &[3, 3, 3])), &[0.5, 0.2, 0.3]);
    let round = |x: &f64| f64::from(*x as f32);
    for method in with_factors() {
        let x = if method.needs_input_grams() { with_grams(x.clone(), 1).0 } else { x.clone() };
        for resolve in [None, Some(LoraCr::default())] {
            let recipe = Recipe { resolve, fusion: fusion(method) };
            let outcome = recipe.run(&cpu(), std::slice::from_ref(&x), true).unwrap().remove(0);
            let expected = outcome.made.factors(&x).unwrap();
            let got = Factors::new(expected.bt().map(round), expected.a().map(round)).unwrap();
            let of = |got: &Factors| measure(got, &outcome.made, &x, &outcome.compared).unwrap();
            let m = of(&got);
            let want = distance(product(&got).as_ref(), product(&expected).as_ref());
            assert!(
                m.error <= 1e-6 && (m.error - want).abs() <= 1e-6 * want + 1e-12,
                "{method}: {}",
                m.error
            );
            let d = updates(&x);
            let d = if resolve.is_some() { plain::resolved(&d) } else { d };
            let mean = weighted(&d, &x.frame.weights);
            let want = distance(product(&got).as_ref(), mean.as_ref());
            assert!((m.distance_to_mean - want).abs() <= 1e-6, "{method}: {} {want}", m.distance_to_mean);
            let double = got.scaled(Some(&[2.0; 26]), None);
            assert!((of(&double).error - 1.0).abs() <= 1e-6, "{method}");
        }
    }
}

/// After LoRA-CR, each method on what it made of the updates.
#[test]
fn resolution_comes_first() {
    let w = [0.5, 0.2, 0.3];
    let x = weigh(batch(&adapters(17, 26, 19, &[3, 3, 3])), &w);
    let (x, grams) = with_grams(x, 5);
    let d = plain::resolved(&updates(&x));
    for (method, want) in [
        (Method::Fedex, weighted(&d, &w)),
        (Method::Tsv, plain::tsv(&d, &w, 1.0)),
        (Method::IsoC, plain::iso_c(&d, &w, 1.0)),
        (Method::KnotsTies, plain::knots_ties(&d, &w, 0.2, 1.0)),
        (Method::Regmean, plain::regmean(&d, &w, &grams)),
        (Method::CatMerging, plain::cat_merging(&d, &w, &grams, 1.0)),
        (Method::PeftCat, weighted(&d, &w)),
    ] {
        let recipe = Recipe { resolve: Some(LoraCr::default()), fusion: fusion(method) };
        let outcome = recipe.run(&cpu(), std::slice::from_ref(&x), true).unwrap().remove(0);
        same(&outcome.made.factors(&x).unwrap(), &want, &format!("{method} after LoRA-CR"));
    }
}

/// One layer of LLaMA-3-8B, two adapters of rank 8: the certificate of every method, and how long it takes. The Grams of
/// `regmean` and `cat-merging` are of 64 tokens.
#[test]
#[ignore = "takes a minute and 3 GB; run with --release"]
fn a_layer_of_llama_3_8b() {
    let (d, kv, f) = (4096, 1024, 14336);
    let dims = [(d, d), (kv, d), (kv, d), (d, d), (f, d), (f, d), (d, f)];
    let batches: Vec<Batch> =
        dims.iter().enumerate().map(|(n, &(o, i))| batch(&adapters(n as u64, o, i, &[8, 8]))).collect();
    let run = |method: Method, batches: &[Batch]| {
        for resolve in [None, Some(LoraCr::default())] {
            let recipe = Recipe { resolve, fusion: fusion(method) };
            let start = std::time::Instant::now();
            // One at a time where a Gram is as large as a weight, as the command does.
            let at_once = if method.needs_input_grams() { 1 } else { batches.len() };
            let outcomes: Vec<_> =
                batches.chunks(at_once).flat_map(|b| recipe.run(&cpu(), b, true).unwrap()).collect();
            let seconds = start.elapsed().as_secs_f64();
            let mut worst = 0.0_f64;
            for (x, outcome) in batches.iter().zip(&outcomes) {
                let error = outcome.write(x, DType::F32).unwrap().certificate.error;
                assert!(error <= 1e-6, "{method}: {error}");
                worst = worst.max(error);
            }
            println!("{method} resolve {}: {seconds:.2} s, error {worst:.1e}", resolve.is_some());
        }
    };
    let (known, plain): (Vec<Method>, Vec<Method>) = with_factors().partition(|m| m.needs_input_grams());
    plain.into_iter().for_each(|method| run(method, &batches));
    let inputs = |i: usize| -> Vec<InputGram> {
        let one = |e: u64| {
            let x = Random(e).matrix(64, i);
            let mut g = Mat::zeros(i, i);
            let par = faer::Par::Seq;
            faer::linalg::matmul::matmul(&mut g, faer::Accum::Replace, x.transpose(), &x, 1.0 / 64.0, par);
            read_gram(&g)
        };
        vec![one(1), one(2)]
    };
    let (narrow, wide) = (inputs(d), inputs(f));
    let with = |b: Batch| match b.frame.size.1 == d {
        true => b.with_inputs(narrow.clone()),
        false => b.with_inputs(wide.clone()),
    };
    let batches: Vec<Batch> = batches.into_iter().map(with).collect();
    known.into_iter().for_each(|method| run(method, &batches));
}

#[test]
fn input_grams_that_are_wrong_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let open = |name: &str| InputGrams::open(&at(name), OpenOptions::default());
    let module = |layer, target| Module { layer, target };
    std::fs::create_dir(at("empty")).unwrap();
    let text = open("empty").unwrap_err().to_string();
    assert!(text.contains("empty: has no input_grams.safetensors: `anabranch grams` makes it"), "{text}");
    let good = gram(1, 6, 20);
    write_gram(&at("good"), &good);
    let grams = open("good").unwrap();
    let text = grams.of(module(2, Target::Up), 6).unwrap_err().to_string();
    assert!(text.contains("layers.2.gate_up is missing, layer 2 up needs it"), "{text}");
    let text = grams.of(module(3, Target::Gate), 7).unwrap_err().to_string();
    assert!(text.contains("layers.3.gate_up is F32 [21], expected F32 [28]"), "{text}");
    let mut bad = good.clone();
    bad[(1, 2)] = f64::NAN;
    write_gram(&at("nan"), &bad);
    let text = open("nan").unwrap().of(module(3, Target::Gate), 6).unwrap().check().unwrap_err();
    assert!(text.to_string().contains("layers.3.gate_up holds NaN or infinity at element 7"), "{text}");
    let mut bad = good.clone();
    bad[(2, 2)] = -1.0;
    write_gram(&at("negative"), &bad);
    let text = open("negative").unwrap().of(module(3, Target::Gate), 6).unwrap().check().unwrap_err();
    assert!(text.to_string().contains("holds -1 on the diagonal at 2"), "{text}");
    // No Gram matrix: what is off the diagonal is more than the diagonal allows.
    let bad = Mat::from_fn(6, 6, |i, j| if i == j { 1.0 } else { 5.0 });
    let x = batch(&adapters(1, 9, 6, &[2])).with_inputs(vec![read_gram(&bad)]);
    let text = fusion(Method::Regmean).fuse(&x, true).unwrap_err().to_string();
    assert!(text.contains("one of them is no Gram matrix") && text.contains("layers.3.gate_up"), "{text}");
    let none = batch(&adapters(1, 9, 6, &[2, 2]));
    let text = fusion(Method::CatMerging).fuse(&none, true).unwrap_err().to_string();
    assert!(text.contains("0 input Grams for 2 adapters") && text.contains("--grams"), "{text}");
}
