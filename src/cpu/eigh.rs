//! See [`crate::ops::eigh`].

use faer::MatRef;
use rayon::prelude::*;

use crate::algebra::eigen;
use crate::error::Result;
use crate::host::Host;
use crate::ops::eigh::Eigh;

pub fn eigh(op: Eigh<'_, Host>) -> Result<()> {
    op.check()?;
    let (mut values, mut vectors, mut a) = (op.values, op.vectors, op.a);
    let mut work = Vec::with_capacity(op.sizes.len());
    for &n in op.sizes {
        let (own, rest) = values.split_at_mut(n);
        let (v, after) = vectors.split_at_mut(n * n);
        let (from, more) = a.split_at(n * n);
        work.push((own, v, from, n));
        (values, vectors, a) = (rest, after, more);
    }
    work.into_par_iter().for_each(|(values, vectors, a, n)| one(values, vectors, a, n));
    Ok(())
}

/// The pairs of one matrix, row by row.
pub(crate) fn one(values: &mut [f64], vectors: &mut [f64], a: &[f64], n: usize) {
    match eigen(MatRef::from_row_major_slice(a, n, n)) {
        Ok((found, v)) => {
            values.copy_from_slice(&found);
            for (i, row) in vectors.chunks_exact_mut(n.max(1)).enumerate() {
                row.iter_mut().enumerate().for_each(|(j, out)| *out = v[(i, j)]);
            }
        }
        Err(_) => {
            values.fill(f64::NAN);
            vectors.fill(f64::NAN);
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn as_the_reference() {
        crate::ops::cases::eigh::conforms(&crate::cpu::tests::on_threads());
    }
}
