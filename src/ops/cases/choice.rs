//! Cases of [`crate::ops::choice`].

use super::cross_entropy::head;
use super::device::{rows, same_on, unwritten};
use super::{assert_close, bits, normal};
use crate::backend::Backend;
use crate::host::{Host, HostMatrix};
use crate::ops::choice::{Choice, reference};
use crate::tensor::Real;

/// Several ids of a row, rows left out, and more rows than a chunk of some devices, against the reference on each of `backends`.
pub fn conforms<B: Backend, T: Real>(backends: &[B]) {
    for (tokens, n, vocab, width) in [(1, 1, 3, 1), (7, 13, 131, 72), (3, 0, 11, 8), (200, 300, 77, 100)] {
        let x = normal::<T>(1, tokens * width, 2.0);
        let asked: Vec<u32> = (0..n).map(|i| (i * tokens / n) as u32).collect();
        let ids: Vec<u32> = (0..n).map(|i| ((i * 37 + vocab - 1) % vocab) as u32).collect();
        let host = HostMatrix::new(head::<T>(vocab, width)).expect("a head");
        let mut want = vec![f32::NAN; n];
        reference(Choice::<Host, T> {
            out: &mut want,
            scratch: &mut [],
            x: &x,
            head: &host,
            rows: &asked,
            ids: &ids,
            tokens,
        })
        .expect("reference");
        let got = same_on(backends, |b| {
            let head = b.matrix(head::<T>(vocab, width)).expect("a head");
            let x = rows(b, &x, width);
            let mut out = unwritten(b, n);
            let mut scratch = unwritten(b, b.choice_scratch::<T>(n, vocab, width, T::DTYPE));
            b.choice::<T>(Choice {
                out: out.view_mut(),
                scratch: scratch.view_mut(),
                x: x.view(),
                head: &head,
                rows: &asked,
                ids: &ids,
                tokens,
            })
            .expect("choice");
            scratch.done(b);
            bits(&out.done(b))
        });
        let got: Vec<f32> = got.into_iter().map(f32::from_bits).collect();
        assert_close(&format!("{n} × {vocab} × {width}"), &got, &want, 1e-6, 1e-5);
    }
}
