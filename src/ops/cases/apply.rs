//! Cases of [`crate::ops::apply`].

use super::device::{flat, holding, same_on};
use super::gram::STACKS;
use super::{close64, normal64};
use crate::backend::Backend;
use crate::ops::apply::{Apply, reference};
use crate::ops::gram::Stack;

/// All in one launch, and one alone.
pub fn conforms<B: Backend>(backends: &[B]) {
    let all = STACKS.map(|(rows, rank)| Stack { rows, rank });
    for stacks in [&all[..], &all[4..5], &[]] {
        let n = Stack::numbers(stacks);
        let (x, w) = (normal64(1, n, 1.0), normal64(2, Stack::squares(stacks), 1.0));
        let mut want = vec![0.0; n];
        reference(Apply { out: &mut want, x: &x, w: &w, stacks }).expect("reference");
        let got = same_on(backends, |b| {
            let (x, w) = (flat(b, &x), flat(b, &w));
            let mut out = holding(b, &vec![f64::NAN; n], -77.0);
            b.apply(Apply { out: out.view_mut(), x: x.view(), w: w.view(), stacks }).expect("apply");
            out.done(b)
        });
        close64("apply", &got, &want, 1e-14, 1e-12);
    }
}
