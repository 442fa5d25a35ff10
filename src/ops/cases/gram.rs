//! Cases of [`crate::ops::gram`].

use super::device::{flat, holding, same_on};
use super::{close64, normal64};
use crate::backend::Backend;
use crate::ops::gram::{Gram, Stack, reference};

/// (n, P): tiles of 16, 32 and 64, parts of them, and several.
pub const STACKS: [(usize, usize); 12] = [
    (1, 1),
    (5, 3),
    (127, 16),
    (0, 4),
    (129, 17),
    (300, 16),
    (64, 32),
    (65, 33),
    (40, 64),
    (31, 65),
    (33, 130),
    (260, 5),
];

/// All in one launch, and each alone.
pub fn conforms<B: Backend>(backends: &[B]) {
    let all = STACKS.map(|(rows, rank)| Stack { rows, rank });
    for stacks in [&all[..], &all[4..5], &[]] {
        let x = normal64(1, Stack::numbers(stacks), 1.0);
        let n = Stack::squares(stacks);
        let mut want = vec![0.0; n];
        reference(Gram { out: &mut want, x: &x, stacks }).expect("reference");
        let got = same_on(backends, |b| {
            let (mut out, x) = (holding(b, &vec![f64::NAN; n], -77.0), flat(b, &x));
            b.gram(Gram { out: out.view_mut(), x: x.view(), stacks }).expect("gram");
            out.done(b)
        });
        // Sums of up to 300 products of order 1.
        close64("gram", &got, &want, 1e-14, 1e-12);
        let mut rest = &got[..];
        for p in stacks.iter().map(|s| s.rank) {
            assert!((0..p * p).all(|i| rest[i] == rest[i % p * p + i / p]), "not symmetric");
            rest = &rest[p * p..];
        }
    }
}
