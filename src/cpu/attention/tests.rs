use half::bf16;

use super::*;
use crate::ops::attention::{AttentionBwd, reference, reference_bwd};
use crate::ops::cases::{assert_close, bits, normal, rounding, same_on_threads, unwritten};

struct Case {
    segments: Vec<Segment>,
    heads: Heads,
    /// Rows of q.
    tokens: usize,
    /// Rows of k and v.
    keys: usize,
}

fn heads(q: usize, kv: usize, dim: usize) -> Heads {
    Heads { q, kv, dim, scale: 1.0 / (dim as f32).sqrt() }
}

fn segment(q: Range<usize>, own: usize, past: &[Range<usize>]) -> Segment {
    Segment { q, own, past: past.to_vec() }
}

/// Packed documents of the given lengths, one after another.
fn packed(lengths: &[usize], heads: Heads) -> Case {
    let mut segments = Vec::new();
    let mut end = 0;
    for n in lengths {
        segments.push(segment(end..end + n, end, &[]));
        end += n;
    }
    Case { segments, heads, tokens: end, keys: end }
}

fn documents() -> Vec<Case> {
    let mut cases = vec![
        packed(&[1], heads(1, 1, 1)),
        packed(&[7], heads(1, 1, 8)),
        packed(&[63, 64, 65], heads(1, 1, 16)),
        packed(&[1, 2, 129], heads(6, 2, 80)),
        packed(&[31, 40, 37, 33], heads(16, 8, 32)),
        packed(&[70], heads(3, 3, 96)),
        packed(&[70], heads(2, 1, 256)),
        packed(&[5, 0, 9], heads(4, 1, 31)),
        // More heads in a group than pairs in a block.
        packed(&[3, 66], heads(67, 1, 8)),
    ];
    // Rows between and after the segments belong to nobody.
    let mut holes = packed(&[3, 70, 4, 20], heads(4, 2, 24));
    holes.segments.remove(2);
    holes.tokens += 5;
    holes.keys += 5;
    cases.push(holes);
    cases
}

fn with_past() -> Vec<Case> {
    vec![
        // Decoding: one query against 500 and 130 keys of a cache.
        Case {
            segments: vec![segment(0..1, 499, &[0..499]), segment(1..2, 640, &[510..640])],
            heads: heads(8, 2, 64),
            tokens: 2,
            keys: 650,
        },
        // A prefix tree: a stem, two branches, and a leaf that has the stem and the second branch as past.
        Case {
            segments: vec![
                segment(0..30, 0, &[]),
                segment(30..41, 30, &[0..30]),
                segment(41..90, 41, &[0..30]),
                segment(90..97, 90, &[0..30, 41..90]),
            ],
            heads: heads(6, 3, 40),
            tokens: 97,
            keys: 97,
        },
        // Prefill in pieces, with an empty run in the past.
        Case {
            segments: vec![segment(2..70, 80, &[0..0, 3..80])],
            heads: heads(2, 2, 12),
            tokens: 72,
            keys: 150,
        },
    ]
}

/// Whether a segment names each row.
fn named(case: &Case) -> Vec<bool> {
    (0..case.tokens).map(|t| case.segments.iter().any(|s| s.q.contains(&t))).collect()
}

/// Compares the rows that segments name; the others must still hold NaN.
fn compare<T: Real>(what: &str, case: &Case, got: &[T], want: &[T], relative: f64, absolute: f64) {
    let width = got.len() / case.tokens;
    for (t, named) in named(case).into_iter().enumerate() {
        let (got, want) = (&got[t * width..(t + 1) * width], &want[t * width..(t + 1) * width]);
        if named {
            assert_close(&format!("{what}, row {t}"), got, want, relative, absolute);
        } else {
            assert!(got.iter().all(|x| x.to_f32().is_nan()), "{what}: row {t} was written");
        }
    }
}

struct Inputs<T> {
    q: Vec<T>,
    k: Vec<T>,
    v: Vec<T>,
}

fn inputs<T: Real>(case: &Case) -> Inputs<T> {
    let h = case.heads;
    Inputs {
        q: normal(1, case.tokens * h.q * h.dim, 2.0),
        k: normal(2, case.keys * h.kv * h.dim, 1.0),
        v: normal(3, case.keys * h.kv * h.dim, 1.0),
    }
}

fn forward<T: Real>(
    case: &Case,
    x: &Inputs<T>,
    f: fn(Attention<'_, Host, T>) -> Result<()>,
) -> (Vec<T>, Vec<f32>) {
    let mut o = unwritten::<T>(case.tokens * case.heads.q * case.heads.dim);
    let mut lse = unwritten::<f32>(case.tokens * case.heads.q);
    let (o_out, lse_out) = (o.out(), lse.out());
    f(Attention {
        o: o_out,
        lse: lse_out,
        q: &x.q,
        k: &x.k,
        v: &x.v,
        segments: &case.segments,
        heads: case.heads,
    })
    .expect("attention");
    (o.done(), lse.done())
}

fn check<T: Real>() {
    for case in documents().into_iter().chain(with_past()) {
        let x = inputs::<T>(&case);
        let what = format!("{:?} {:?}", case.heads, case.segments);
        same_on_threads(|| {
            let (o, lse) = forward(&case, &x, attention);
            (bits(&o), bits(&lse))
        });
        let (o, lse) = forward(&case, &x, attention);
        let (o_want, lse_want) = forward(&case, &x, reference);
        // One rounding of o, one of each exponential (of mixed signs, weights that add up to 1), f32 sums.
        let eps = rounding::<T>();
        let sums = 1e-6 + 3e-7 * (case.heads.dim as f64).sqrt();
        compare(&format!("o {what}"), &case, &o, &o_want, 2.0 * eps, 2.0 * eps + sums);
        compare(&format!("lse {what}"), &case, &lse, &lse_want, 1e-6, sums);
    }
}

#[test]
fn as_the_reference_in_f32() {
    check::<f32>();
}

#[test]
fn as_the_reference_in_bf16() {
    check::<bf16>();
}

fn check_backward<T: Real>() {
    for case in documents() {
        let (h, x) = (case.heads, inputs::<T>(&case));
        let (wide, narrow) = (case.tokens * h.q * h.dim, case.tokens * h.kv * h.dim);
        // Rows of nobody hold NaN; nobody may read them.
        let (o, lse) = forward(&case, &x, reference);
        let do_ = normal::<T>(4, wide, 1.0);
        let run = |f: fn(AttentionBwd<'_, Host, T>) -> Result<()>| {
            let (mut dq, mut dk, mut dv) =
                (unwritten::<T>(wide), unwritten::<T>(narrow), unwritten::<T>(narrow));
            let (dq_out, dk_out, dv_out) = (dq.out(), dk.out(), dv.out());
            f(AttentionBwd {
                dq: dq_out,
                dk: dk_out,
                dv: dv_out,
                do_: &do_,
                o: &o,
                lse: &lse,
                q: &x.q,
                k: &x.k,
                v: &x.v,
                segments: &case.segments,
                heads: h,
            })
            .expect("gradients");
            [dq.done(), dk.done(), dv.done()]
        };
        same_on_threads(|| run(attention_bwd).map(|x| bits(&x)));
        let (got, want) = (run(attention_bwd), run(reference_bwd));
        // A gradient is a sum of rounded terms of size eps · |ds| · |k|; the f32 errors of scores weigh less.
        let eps = rounding::<T>();
        let longest = case.segments.iter().map(|s| s.q.len()).max().unwrap_or(0);
        let terms = ((longest * h.q / h.kv) as f64).sqrt();
        for ((name, got), want) in ["dq", "dk", "dv"].iter().zip(&got).zip(&want) {
            let size = (want.iter().filter(|x| !x.to_f32().is_nan()))
                .map(|x| f64::from(x.to_f32()).powi(2))
                .sum::<f64>();
            let rms = (size / want.len() as f64).sqrt();
            let what = format!("{name} {h:?} {:?}", case.segments);
            compare(&what, &case, got, want, 2.0 * eps, (2.0 * eps + 1e-6) * (rms * 4.0 + terms * 0.5));
        }
    }
}

#[test]
fn gradients_as_the_reference_in_f32() {
    check_backward::<f32>();
}

#[test]
fn gradients_as_the_reference_in_bf16() {
    check_backward::<bf16>();
}

/// A document in pieces, each with the earlier ones as past, gives the bytes of the whole document.
#[test]
fn a_cache_changes_nothing() {
    for h in [heads(4, 2, 64), heads(5, 1, 24)] {
        let whole = packed(&[150], h);
        let x = inputs::<f32>(&whole);
        let (o, lse) = forward(&whole, &x, attention);
        for cuts in [vec![149, 150], vec![64, 128, 150], vec![1, 2, 3, 60, 61, 150]] {
            let mut start = 0;
            let mut segments = Vec::new();
            for &end in &cuts {
                segments.push(segment(start..end, start, &[0..start / 2, start / 2..start]));
                start = end;
            }
            let pieces = Case { segments, heads: h, tokens: 150, keys: 150 };
            let (o_pieces, lse_pieces) = forward(&pieces, &x, attention);
            assert!(bits(&o) == bits(&o_pieces), "{cuts:?}");
            assert!(bits(&lse) == bits(&lse_pieces), "{cuts:?}");
        }
    }
}

/// Scores beyond what `eˣ` holds.
#[test]
fn large_scores() {
    let case = packed(&[70], heads(2, 1, 16));
    let mut x = inputs::<f32>(&case);
    x.q.iter_mut().for_each(|q| *q *= 100.0);
    let (o, lse) = forward(&case, &x, attention);
    let (o_want, lse_want) = forward(&case, &x, reference);
    assert!(lse_want.iter().any(|l| *l > 200.0));
    compare("o", &case, &o, &o_want, 1e-4, 1e-4);
    compare("lse", &case, &lse, &lse_want, 1e-6, 1e-4);
}
