//! A fused update as a file holds it: rounded to a dtype a few columns at a time, and measured while it is.

use crate::checkpoint::convert;
use crate::error::{Error, Result};
use crate::fuse::certificate::ModuleCertificate;
use crate::fuse::factors::{Batch, Factors, Rows};
use crate::fuse::measure::{Measured, Measuring, measure};
use crate::fuse::pipeline::Outcome;
use crate::tensor::DType;

/// Rows and columns that are turned around at once: a line of the cache of each.
const TURNED: usize = 16;

/// The factors of a module as their file holds them, little-endian, and their certificate.
#[derive(Clone, Debug)]
pub struct Written {
    /// `A[K, I]`, row by row.
    pub a: Vec<u8>,
    /// `B[O, K]`, row by row.
    pub b: Vec<u8>,
    /// Of what the bytes say.
    pub certificate: ModuleCertificate,
}

impl Outcome {
    /// Rounds the result once to `dtype`, and measures what became of it.
    ///
    /// Fails where a rounded number is not finite.
    pub fn write(&self, read: &Batch, dtype: DType) -> Result<Written> {
        let (rank, (o, i)) = (self.made.rank(&read.frame), read.frame.size);
        let (mut a, mut b) = (vec![0; rank * i * dtype.size()], vec![0; rank * o * dtype.size()]);
        let round = |expected: &[f64], got: &mut [f64], bytes: &mut Vec<u8>| {
            bytes.clear();
            convert::narrow_f64(bytes, expected, dtype);
            convert::widen_f64(got, bytes, dtype);
        };
        let (mut of_a, mut of_b) = (Vec::new(), Vec::new());
        let own = Measuring { made: &self.made, inputs: read, compared: &self.compared, rank };
        let measured = own.measure(
            |first, expected, got| {
                round(expected, got, &mut of_b);
                b[first * rank * dtype.size()..][..of_b.len()].copy_from_slice(&of_b);
            },
            |first, expected, got| {
                round(expected, got, &mut of_a);
                match dtype.size() {
                    2 => turn::<2>(&mut a, &of_a, (rank, first, i)),
                    _ => turn::<4>(&mut a, &of_a, (rank, first, i)),
                }
            },
        );
        if convert::first_non_finite(&a, dtype).or(convert::first_non_finite(&b, dtype)).is_some() {
            return Err(Error::Numeric(format!(
                "{}: a factor of the result is no number, or too large for {dtype} (--dtype f32 has the widest range)",
                read.frame.module
            )));
        }
        let certificate = self.certificate(read, measured?, || {
            let wide = |bytes: &[u8], n: usize| {
                let mut out = vec![0.0; rank * n];
                convert::widen_f64(&mut out, bytes, dtype);
                out
            };
            Factors::new(Rows::new(wide(&b, o), rank), Rows::from_rows(&wide(&a, i), rank))
        })?;
        Ok(Written { a, b, certificate })
    }

    /// The certificate of a result that was written as `got`.
    pub fn certify(&self, read: &Batch, got: &Factors) -> Result<ModuleCertificate> {
        let measured = measure(got, &self.made, read, &self.compared)?;
        self.certificate(read, measured, || Ok(got.clone()))
    }

    /// Where the method works on entries, expected are these, every one of them, and the error is all that the factors
    /// miss: what truncation left out, and what the search and the rounding did.
    fn certificate(
        &self,
        read: &Batch,
        measured: Measured,
        got: impl FnOnce() -> Result<Factors>,
    ) -> Result<ModuleCertificate> {
        let rank = self.made.rank(&read.frame);
        let mut out = ModuleCertificate::of(&read.frame, &self.compared, &self.variant, rank, measured);
        out.energy_kept = self.energy_kept;
        if let Some(entries) = &self.entries {
            let (error, kept) = entries.distance_to(&got()?)?;
            (out.error, out.kept) = (error, Some(kept));
        }
        Ok(out)
    }
}

/// Columns of `rank` numbers of N bytes become columns from `first` on of `out`, rows of `width` numbers.
fn turn<const N: usize>(out: &mut [u8], columns: &[u8], (rank, first, width): (usize, usize, usize)) {
    let (out, columns) = (out.as_chunks_mut::<N>().0, columns.as_chunks::<N>().0);
    let some = columns.len().checked_div(rank).unwrap_or(0);
    for row in (0..rank).step_by(TURNED) {
        for column in (0..some).step_by(TURNED) {
            let wide = TURNED.min(some - column);
            for k in row..rank.min(row + TURNED) {
                let out = &mut out[k * width + first + column..][..wide];
                let from = columns[column * rank + k..].iter().step_by(rank);
                out.iter_mut().zip(from).for_each(|(out, x)| *out = *x);
            }
        }
    }
}
