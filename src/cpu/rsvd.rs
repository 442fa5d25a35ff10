//! See [`crate::ops::rsvd`].

use std::ops::Range;

use crate::algebra::rsvd::{RowBlocks, rsvd as of_rows};
use crate::error::{Error, Result};
use crate::host::{Host, HostMatrix};
use crate::ops::rsvd::Rsvd;
use crate::tensor::Frozen;

impl RowBlocks for HostMatrix {
    fn size(&self) -> (usize, usize) {
        Frozen::size(self)
    }
    fn read(&self, out: &mut [f32], rows: Range<usize>) -> Result<()> {
        self.rows::<f32>(out, rows);
        Ok(())
    }
}

/// Weights one after the other: each is read by all threads.
pub fn rsvd(op: Rsvd<'_, Host>) -> Result<()> {
    op.check()?;
    let (o, i) = op.size();
    let k = op.sketch.values((o, i));
    let mut vectors = op.vectors;
    for (n, (a, tensor)) in op.a.iter().zip(op.tensors).enumerate() {
        let values = n * k..(n + 1) * k;
        let (u, v) = (n * o * k..(n + 1) * o * k, n * i * k..(n + 1) * i * k);
        let found = match of_rows(*a, &op.sketch, *tensor) {
            Ok(found) => found,
            Err(Error::Numeric(_)) => {
                op.values[values.clone()].fill(f64::NAN);
                op.residuals[values].fill(f64::NAN);
                op.energy[n] = f64::NAN;
                if let Some((all_u, all_v)) = &mut vectors {
                    all_u[u].fill(f64::NAN);
                    all_v[v].fill(f64::NAN);
                }
                continue;
            }
            Err(other) => return Err(other),
        };
        op.values[values.clone()].copy_from_slice(&found.values);
        op.residuals[values].copy_from_slice(&found.residuals);
        op.energy[n] = found.energy;
        if let Some((all_u, all_v)) = &mut vectors {
            for (to, from) in [(&mut all_u[u], &found.u), (&mut all_v[v], &found.v)] {
                to.iter_mut().enumerate().for_each(|(at, to)| *to = from[(at / k, at % k)]);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn as_the_reference() {
        crate::ops::cases::rsvd::conforms(&crate::cpu::tests::on_threads());
    }
}
