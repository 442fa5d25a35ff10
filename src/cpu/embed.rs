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
    use half::bf16;

    use super::*;
    use crate::cpu::tests::on_threads;
    use crate::host::HostMatrix;
    use crate::ops::cases::embed::{conforms, table};

    #[test]
    fn as_the_reference_in_f32() {
        conforms::<_, f32>(&on_threads());
    }

    #[test]
    fn as_the_reference_in_bf16() {
        conforms::<_, bf16>(&on_threads());
    }

    #[test]
    fn refuses_an_id_outside_of_the_table() {
        let table = HostMatrix::new(table::<f32>(3, 1)).expect("a table");
        let mut y = [0f32; 2];
        let err = embed(Embed { y: &mut y, table: &table, ids: &[2, 3] }).expect_err("an error");
        assert_eq!(err.to_string(), "embed: token 1 has id 3, expected an id below V = 3");
    }
}
