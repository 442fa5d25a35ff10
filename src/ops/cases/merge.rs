//! Cases of [`crate::ops::merge`].

use half::{bf16, f16};

use super::device::{flat, holding, same_on};
use super::{bits, close64, normal};
use crate::backend::Backend;
use crate::ops::merge::{Merge, ROWS, Update, reference};
use crate::tensor::Real;

/// (O, I, the updates' ranks): one row and column, odd widths, below and above blocks of rows and columns, ranks of
/// several slices, several updates, one of nothing.
const SIZES: [(usize, usize, &[usize]); 9] = [
    (1, 1, &[1]),
    (3, 5, &[8]),
    (16, 256, &[0]),
    (17, 257, &[3, 0, 5]),
    (15, 255, &[16]),
    (64, 64, &[64]),
    (33, 70, &[65, 130]),
    (5, 519, &[1, 2, 3, 4]),
    (0, 4, &[2]),
];

/// The reference's bytes, in every dtype.
pub fn conforms<B: Backend>(backends: &[B]) {
    of::<B, f32>(backends);
    of::<B, f16>(backends);
    of::<B, bf16>(backends);
    refused(&backends[0]);
}

fn of<B: Backend, T: Real>(backends: &[B]) {
    for (o, i, ranks) in SIZES {
        // Updates far below the weights, alike, and far above; the smallest numbers; beyond the largest of f16.
        for (size, strength) in [(0.02, 1e-4), (1.0, 1.0), (1e-3, 30.0), (1e-7, 1e-7), (3e4, 1e4)] {
            let mut w = normal::<T>(1, o * i, size);
            if let Some(first) = w.first_mut() {
                *first = T::from_f32(-0.0);
            }
            let factors: Vec<(Vec<f32>, Vec<f32>, usize, f32)> = ranks
                .iter()
                .zip(2..)
                .map(|(&r, seed)| {
                    (normal(seed, r * i, 1.0), normal(seed + 20, o * r, strength), r, 0.5 + seed as f32 / 3.0)
                })
                .collect();
            let (mut want, mut want_sums) = (w.clone(), vec![f64::NAN; o.div_ceil(ROWS) * 2]);
            let updates: Vec<_> = factors
                .iter()
                .map(|(a, b, rank, scale)| Update { a: &a[..], b: &b[..], rank: *rank, scale: *scale })
                .collect();
            let op = Merge { w: &mut want[..], sums: &mut want_sums[..], updates, out: o, inner: i };
            reference::<T>(op).expect("reference");
            let (got, sums) = same_on(backends, |b| {
                let mut out = holding(b, &w, T::from_f32(-77.0));
                let mut sums = holding(b, &vec![f64::NAN; want_sums.len()], -77.0);
                let inputs: Vec<_> = factors.iter().map(|(x, y, ..)| (flat(b, x), flat(b, y))).collect();
                let updates: Vec<_> = inputs
                    .iter()
                    .zip(&factors)
                    .map(|((x, y), f)| Update { a: x.view(), b: y.view(), rank: f.2, scale: f.3 })
                    .collect();
                let op = Merge { w: out.view_mut(), sums: sums.view_mut(), updates, out: o, inner: i };
                b.merge::<T>(op).expect("merge");
                (bits(&out.done(b)), sums.done(b).into_iter().map(f64::to_bits).collect::<Vec<_>>())
            });
            let what = format!("{} [{o}, {i}] of ranks {ranks:?}, {size} and {strength}", T::DTYPE);
            assert!(got == bits(&want), "{what}");
            let sums: Vec<f64> = sums.into_iter().map(f64::from_bits).collect();
            // What is lost is infinite where a sum is beyond the dtype.
            let finite =
                |x: &[f64]| x.iter().map(|x| if x.is_finite() { *x } else { -1.0 }).collect::<Vec<_>>();
            close64(&what, &finite(&sums), &finite(&want_sums), 1e-12, 1e-300);
        }
    }
}

/// Sizes that do not fit, with the words for it.
fn refused<B: Backend>(backend: &B) {
    let x = flat::<B, f32>(backend, &[1.0; 6]);
    let mut w = holding::<B, f32>(backend, &[1.0; 6], -77.0);
    let mut sums = holding(backend, &[0.0; 2], -77.0);
    for (rank, count, why) in [
        (2, 0, "merge: no update"),
        (1, 1, "merge: A holds 6 elements, expected R × I = 1 × 3"),
        (2, 1, "merge: B holds 6 elements, expected O × R = 2 × 2"),
    ] {
        let update = |_| Update { a: x.view(), b: x.view(), rank, scale: 1.0 };
        let updates: Vec<_> = (0..count).map(update).collect();
        let op = Merge { w: w.view_mut(), sums: sums.view_mut(), updates, out: 2, inner: 3 };
        let err = backend.merge::<f32>(op).expect_err(why).to_string();
        assert!(err.contains(why), "{err}");
    }
}
