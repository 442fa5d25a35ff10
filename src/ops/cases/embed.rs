//! Cases of [`crate::ops::embed`].

use std::sync::Arc;

use half::{bf16, f16};

use super::device::{same_on, unwritten_rows};
use super::{bits, normal};
use crate::backend::Backend;
use crate::host::{HostMatrix, MatrixSource};
use crate::ops::embed::{Embed, reference};
use crate::tensor::Real;

const VOCAB: usize = 11;

/// A table of random numbers.
pub fn table<U: Real>(vocab: usize, width: usize) -> MatrixSource {
    let bytes = bytemuck::cast_slice(&normal::<U>(1, vocab * width, 1.0)).to_vec();
    let range = 0..bytes.len();
    MatrixSource {
        name: "table".into(),
        bytes: Arc::new(bytes),
        range,
        dtype: U::DTYPE,
        size: (vocab, width),
    }
}

/// The bytes of the reference on each of `backends`, from tables of every dtype.
pub fn conforms<B: Backend, T: Real>(backends: &[B]) {
    from::<B, T, f32>(backends);
    from::<B, T, f16>(backends);
    from::<B, T, bf16>(backends);
}

fn from<B: Backend, T: Real, U: Real>(backends: &[B]) {
    for (tokens, width) in [(1, 1), (5, 7), (3, 13), (300, 64), (2, (1 << 14) + 1)] {
        let ids: Vec<u32> = (0..tokens).map(|t| (t * 7 % VOCAB) as u32).collect();
        let mut want = vec![T::from_f32(f32::NAN); tokens * width];
        let host = HostMatrix::new(table::<U>(VOCAB, width)).expect("a table");
        reference(Embed { y: &mut want, table: &host, ids: &ids }).expect("rows");
        let got = same_on(backends, |b| {
            let table = b.matrix(table::<U>(VOCAB, width)).expect("a table");
            let mut y = unwritten_rows::<B, T>(b, tokens, width);
            b.embed::<T>(Embed { y: y.view_mut(), table: &table, ids: &ids }).expect("rows");
            bits(&y.done(b))
        });
        assert!(got == bits(&want), "{tokens} × {width} from {} to {}", U::DTYPE, T::DTYPE);
    }
}
