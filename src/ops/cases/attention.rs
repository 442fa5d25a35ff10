//! Cases of [`crate::ops::attention`].

use std::ops::Range;

use super::device::{flat, rows, same_on, unwritten, unwritten_rows};
use super::{assert_close, bits, normal, rounding};
use crate::backend::Backend;
use crate::host::Host;
use crate::ops::attention::{Attention, AttentionBwd, Heads, Segment, reference, reference_bwd};
use crate::tensor::{DType, Real};

/// Who sees whom, and sizes.
pub struct Case {
    pub segments: Vec<Segment>,
    pub heads: Heads,
    /// Rows of q.
    pub tokens: usize,
    /// Rows of k and v.
    pub keys: usize,
}

/// Heads with the usual scale.
pub fn heads(q: usize, kv: usize, dim: usize) -> Heads {
    Heads { q, kv, dim, scale: 1.0 / (dim as f32).sqrt() }
}

fn segment(q: Range<usize>, own: usize, past: &[Range<usize>]) -> Segment {
    Segment { q, own, past: past.to_vec() }
}

/// Packed documents of the given lengths, one after another.
pub fn packed(lengths: &[usize], heads: Heads) -> Case {
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
        packed(&[1], heads(1, 1, 2)),
        packed(&[7], heads(1, 1, 8)),
        packed(&[63, 64, 65], heads(1, 1, 16)),
        packed(&[1, 2, 129], heads(6, 2, 80)),
        packed(&[31, 40, 37, 33], heads(16, 8, 32)),
        packed(&[70], heads(3, 3, 96)),
        packed(&[70], heads(2, 1, 256)),
        packed(&[5, 0, 9], heads(4, 1, 30)),
        packed(&[90, 3], heads(4, 1, 128)),
        packed(&[33], heads(2, 2, 150)),
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

/// Odd head widths, which a device may refuse.
fn odd() -> Vec<Case> {
    vec![packed(&[1], heads(1, 1, 1)), packed(&[5, 0, 9], heads(4, 1, 31))]
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

/// Compares the rows that segments name; the others must still hold NaN.
fn compare<T: Real>(what: &str, case: &Case, got: &[T], want: &[T], relative: f64, absolute: f64) {
    let width = got.len() / case.tokens;
    for t in 0..case.tokens {
        let (got, want) = (&got[t * width..(t + 1) * width], &want[t * width..(t + 1) * width]);
        if case.segments.iter().any(|s| s.q.contains(&t)) {
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

fn inputs<T: Real>(case: &Case, size: f32) -> Inputs<T> {
    let h = case.heads;
    Inputs {
        q: normal(1, case.tokens * h.q * h.dim, 2.0 * size),
        k: normal(2, case.keys * h.kv * h.dim, 1.0),
        v: normal(3, case.keys * h.kv * h.dim, 1.0),
    }
}

fn wanted<T: Real>(case: &Case, x: &Inputs<T>) -> (Vec<T>, Vec<f32>) {
    let mut o = vec![T::from_f32(f32::NAN); case.tokens * case.heads.q * case.heads.dim];
    let mut lse = vec![f32::NAN; case.tokens * case.heads.q];
    reference::<T>(Attention {
        o: &mut o,
        lse: &mut lse,
        q: &x.q,
        k: &x.k,
        v: &x.v,
        segments: &case.segments,
        heads: case.heads,
    })
    .expect("reference");
    (o, lse)
}

fn forward<B: Backend, T: Real>(b: &B, case: &Case, x: &Inputs<T>) -> (Vec<T>, Vec<f32>) {
    let (wide, narrow) = (case.heads.q * case.heads.dim, case.heads.kv * case.heads.dim);
    let (q, k, v) = (rows(b, &x.q, wide), rows(b, &x.k, narrow), rows(b, &x.v, narrow));
    let mut o = unwritten_rows::<B, T>(b, case.tokens, wide);
    let mut lse = unwritten(b, case.tokens * case.heads.q);
    b.attention::<T>(Attention {
        o: o.view_mut(),
        lse: lse.view_mut(),
        q: q.view(),
        k: k.view(),
        v: v.view(),
        segments: &case.segments,
        heads: case.heads,
    })
    .expect("attention");
    (o.done(b), lse.done(b))
}

fn check<B: Backend, T: Real>(backends: &[B], case: &Case) {
    let x = inputs::<T>(case, 1.0);
    let what = format!("{:?} {:?}", case.heads, case.segments);
    let (o, lse) = same_on(backends, |b| {
        let (o, lse) = forward(b, case, &x);
        (bits(&o), bits(&lse))
    });
    let widen = |x: Vec<u32>| x.into_iter().map(f32::from_bits);
    let (o, lse): (Vec<T>, Vec<f32>) = (widen(o).map(T::from_f32).collect(), widen(lse).collect());
    let (o_want, lse_want) = wanted(case, &x);
    // One rounding of o, one of each exponential (of mixed signs, weights that add up to 1), f32 sums.
    let eps = rounding::<T>();
    let sums = 1e-6 + 3e-7 * (case.heads.dim as f64).sqrt();
    compare(&format!("o {what}"), case, &o, &o_want, 2.0 * eps, 2.0 * eps + sums);
    compare(&format!("lse {what}"), case, &lse, &lse_want, 1e-6, sums);
}

/// Documents, caches and trees of even head widths against the reference on each of `backends`.
pub fn conforms<B: Backend, T: Real>(backends: &[B]) {
    documents().iter().chain(&with_past()).for_each(|case| check::<B, T>(backends, case));
}

/// The same for odd head widths.
pub fn conforms_odd<B: Backend, T: Real>(backends: &[B]) {
    odd().iter().for_each(|case| check::<B, T>(backends, case));
}

/// Gradients of documents against the reference on each of `backends`.
pub fn conforms_backward<B: Backend, T: Real>(backends: &[B]) {
    documents().iter().for_each(|case| check_backward::<B, T>(backends, case));
}

/// The same for odd head widths.
pub fn conforms_backward_odd<B: Backend, T: Real>(backends: &[B]) {
    odd().iter().for_each(|case| check_backward::<B, T>(backends, case));
}

fn check_backward<B: Backend, T: Real>(backends: &[B], case: &Case) {
    let (h, x) = (case.heads, inputs::<T>(case, 1.0));
    let (wide, narrow) = (h.q * h.dim, h.kv * h.dim);
    // Rows of nobody hold NaN; nobody may read them.
    let (o, lse) = wanted(case, &x);
    let do_ = normal::<T>(4, case.tokens * wide, 1.0);
    let nan = |n: usize| vec![T::from_f32(f32::NAN); case.tokens * n];
    let (mut dq, mut dk, mut dv) = (nan(wide), nan(narrow), nan(narrow));
    reference_bwd::<T>(AttentionBwd::<Host, T> {
        dq: &mut dq,
        dk: &mut dk,
        dv: &mut dv,
        scratch: &mut [],
        do_: &do_,
        o: &o,
        lse: &lse,
        q: &x.q,
        k: &x.k,
        v: &x.v,
        segments: &case.segments,
        heads: h,
    })
    .expect("reference");
    let want = [dq, dk, dv];

    let got = same_on(backends, |b| {
        let [q, o, do_] = [&x.q, &o, &do_].map(|x| rows(b, x, wide));
        let [k, v] = [&x.k, &x.v].map(|x| rows(b, x, narrow));
        let lse = flat(b, &lse);
        let mut dq = unwritten_rows::<B, T>(b, case.tokens, wide);
        let [mut dk, mut dv] = [(); 2].map(|()| unwritten_rows::<B, T>(b, case.tokens, narrow));
        let mut scratch = unwritten(b, b.attention_bwd_scratch(case.tokens, h.q));
        b.attention_bwd::<T>(AttentionBwd {
            dq: dq.view_mut(),
            dk: dk.view_mut(),
            dv: dv.view_mut(),
            scratch: scratch.view_mut(),
            do_: do_.view(),
            o: o.view(),
            lse: lse.view(),
            q: q.view(),
            k: k.view(),
            v: v.view(),
            segments: &case.segments,
            heads: h,
        })
        .expect("gradients");
        scratch.done(b);
        [dq, dk, dv].map(|x| bits(&x.done(b)))
    });
    // A gradient is a sum of rounded terms of size eps · |ds| · |k|; the f32 errors of scores weigh less.
    let eps = rounding::<T>();
    let longest = case.segments.iter().map(|s| s.q.len()).max().unwrap_or(0);
    let terms = ((longest * h.q / h.kv) as f64).sqrt();
    for ((name, got), want) in ["dq", "dk", "dv"].iter().zip(got).zip(&want) {
        let got: Vec<T> = got.into_iter().map(|x| T::from_f32(f32::from_bits(x))).collect();
        let numbers = want.iter().filter(|x| !x.to_f32().is_nan());
        let size = numbers.map(|x| f64::from(x.to_f32()).powi(2)).sum::<f64>();
        let rms = (size / want.len() as f64).sqrt();
        let what = format!("{name} {h:?} {:?}", case.segments);
        compare(&what, case, &got, want, 2.0 * eps, (2.0 * eps + 1e-6) * (rms * 4.0 + terms * 0.5));
    }
}

/// A document in pieces, each with the earlier ones as past, gives the bytes of the whole document.
pub fn a_cache_changes_nothing<B: Backend, T: Real>(b: &B) {
    for h in [heads(4, 2, 64), heads(5, 1, 24)] {
        let whole = packed(&[150], h);
        let x = inputs::<T>(&whole, 1.0);
        let (o, lse) = forward(b, &whole, &x);
        for cuts in [vec![149, 150], vec![64, 128, 150], vec![1, 2, 3, 60, 61, 150]] {
            let mut start = 0;
            let mut segments = Vec::new();
            for &end in &cuts {
                segments.push(segment(start..end, start, &[0..start / 2, start / 2..start]));
                start = end;
            }
            let pieces = Case { segments, heads: h, tokens: 150, keys: 150 };
            let (o_pieces, lse_pieces) = forward(b, &pieces, &x);
            assert!(bits(&o) == bits(&o_pieces), "{cuts:?}");
            assert!(bits(&lse) == bits(&lse_pieces), "{cuts:?}");
        }
    }
}

/// Scores beyond what `eˣ` holds.
pub fn large_scores<B: Backend, T: Real>(b: &B) {
    let case = packed(&[70], heads(2, 1, 16));
    let x = inputs::<T>(&case, 100.0);
    let (o, lse) = forward(b, &case, &x);
    let (o_want, lse_want) = wanted(&case, &x);
    assert!(lse_want.iter().any(|l| *l > 200.0));
    let o_err = if T::DTYPE == DType::F32 { 1e-4 } else { 3.0 * rounding::<T>() };
    compare("o", &case, &o, &o_want, o_err, o_err);
    compare("lse", &case, &lse, &lse_want, 1e-6, 1e-4);
}
