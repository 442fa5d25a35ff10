//! Cases of [`crate::ops::swiglu`].

use super::device::{holding_rows, rows, same_on, unwritten_rows};
use super::{assert_close, normal, rounding};
use crate::backend::Backend;
use crate::host::Host;
use crate::ops::swiglu::{SwiGlu, SwiGluBwd, reference, reference_bwd};
use crate::tensor::Real;

const SIZES: [(usize, usize); 9] =
    [(1, 1), (1, 13), (3, 64), (2, 67), (5, 255), (1, 2047), (2, 2048), (1, (1 << 14) + 1), (3, 5734)];

/// Forward and backward against the reference on each of `backends`, which must agree to the byte.
pub fn conforms<B: Backend, T: Real>(backends: &[B]) {
    for (tokens, width) in SIZES {
        let n = tokens * width;
        let [mut gate, up, dh] = [1, 2, 3].map(|seed| normal::<T>(seed, n, 3.0));
        let far = [-200.0, 200.0, -95.0, 95.0, -88.0, 0.0];
        gate.iter_mut().skip(1).zip(far).for_each(|(gate, x)| *gate = T::from_f32(x));
        let relative = 2.0 * rounding::<T>() + 5e-7;

        let mut h_want = vec![T::zeroed(); n];
        reference(SwiGlu::<Host, T> { h: &mut h_want, gate: &gate, up: &up, tokens, width })
            .expect("reference");
        let h = same_on(backends, |b| {
            let [gate, up] = [&gate, &up].map(|x| rows(b, x, width));
            let mut h = unwritten_rows::<B, T>(b, tokens, width);
            b.swiglu::<T>(SwiGlu { h: h.view_mut(), gate: gate.view(), up: up.view(), tokens, width })
                .expect("swiglu");
            h.done(b)
        });
        assert_close("h", &h, &h_want, relative, 1e-37);

        let (mut dgate_want, mut dup_want) = (gate.clone(), up.clone());
        let (of_gate, of_up) = (&mut dgate_want, &mut dup_want);
        reference_bwd(SwiGluBwd::<Host, T> { gate: of_gate, up: of_up, dh: &dh, tokens, width })
            .expect("reference");
        let (dgate, dup) = same_on(backends, |b| {
            let dh = rows(b, &dh, width);
            let [mut gate, mut up] = [&gate, &up].map(|x| holding_rows(b, x, width));
            let (of_gate, of_up) = (gate.view_mut(), up.view_mut());
            b.swiglu_bwd::<T>(SwiGluBwd { gate: of_gate, up: of_up, dh: dh.view(), tokens, width })
                .expect("swiglu_bwd");
            (gate.done(b), up.done(b))
        });
        // 1 − σ and 1 + z(1 − σ) cancel, so the error is one of the factors', not of the result.
        assert_close("dgate", &dgate, &dgate_want, relative, 1e-5);
        assert_close("dup", &dup, &dup_want, relative, 1e-37);
    }
}
