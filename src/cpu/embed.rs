//! See [`crate::ops::embed`].

use rayon::prelude::*;

use super::parts;
use crate::error::Result;
use crate::host::{Elements, Host};
use crate::ops::embed::Embed;
use crate::tensor::Real;

pub fn embed<T: Real>(op: Embed<'_, Host, T>) -> Result<()> {
    let (_, width) = op.check()?;
    match op.table.elements() {
        Elements::BF16(table) => gather(op.y, table, op.ids, width),
        Elements::F16(table) => gather(op.y, table, op.ids, width),
        Elements::F32(table) => gather(op.y, table, op.ids, width),
    }
    Ok(())
}

fn gather<T: Real, U: Real>(y: &mut [T], table: &[U], ids: &[u32], width: usize) {
    if width == 0 {
        return;
    }
    let rows = parts::rows(width);
    y.par_chunks_mut(rows * width).zip(ids.par_chunks(rows)).for_each(|(y, ids)| {
        for (y, &id) in y.chunks_exact_mut(width).zip(ids) {
            for (y, e) in y.iter_mut().zip(&table[id as usize * width..]) {
                *y = T::from_f32(e.to_f32());
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use half::{bf16, f16};

    use super::*;
    use crate::host::{HostMatrix, MatrixSource};
    use crate::ops::cases::{bits, normal, same_on_threads, unwritten};
    use crate::ops::embed::reference;

    fn table<U: Real>(vocab: usize, width: usize) -> HostMatrix {
        let bytes = bytemuck::cast_slice(&normal::<U>(1, vocab * width, 1.0)).to_vec();
        let range = 0..bytes.len();
        let source = MatrixSource {
            name: "table".into(),
            bytes: Arc::new(bytes),
            range,
            dtype: U::DTYPE,
            size: (vocab, width),
        };
        HostMatrix::new(source).expect("a table")
    }

    fn check<T: Real, U: Real>() {
        for (tokens, width) in [(1, 1), (5, 7), (300, 64), (2, parts::ELEMENTS + 1)] {
            let table = table::<U>(11, width);
            let ids: Vec<u32> = (0..tokens).map(|t| (t * 7 % 11) as u32).collect();
            let mut want = vec![T::from_f32(f32::NAN); tokens * width];
            reference(Embed { y: &mut want, table: &table, ids: &ids }).expect("rows");
            let got = same_on_threads(|| {
                let mut y = unwritten::<T>(tokens * width);
                embed(Embed { y: y.out(), table: &table, ids: &ids }).expect("rows");
                bits(&y.done())
            });
            assert!(got == bits(&want), "{tokens} × {width} from {} to {}", U::DTYPE, T::DTYPE);
        }
    }

    #[test]
    fn as_the_reference() {
        check::<f32, f32>();
        check::<f32, f16>();
        check::<f32, bf16>();
        check::<bf16, f32>();
        check::<bf16, f16>();
        check::<bf16, bf16>();
    }

    #[test]
    fn refuses_an_id_outside_of_the_table() {
        let mut y = [0f32; 2];
        let err = embed(Embed { y: &mut y, table: &table::<f32>(3, 1), ids: &[2, 3] }).expect_err("an error");
        assert_eq!(err.to_string(), "embed: token 1 has id 3, expected an id below V = 3");
    }
}
