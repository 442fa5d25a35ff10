//! See [`crate::ops::sum_sq`].

use super::parts::ELEMENTS;
use super::simd::{self, Isa, Kernel};
use crate::error::Result;
use crate::host::Host;
use crate::ops::sum_sq::SumSq;

pub fn sum_sq(op: SumSq<'_, Host>) -> Result<()> {
    op.check()?;
    op.out[0] = tree(op.x);
    Ok(())
}

/// The sum over a binary tree whose shape is a function of the length.
fn tree(x: &[f32]) -> f64 {
    if x.len() <= ELEMENTS {
        return simd::run(Part(x));
    }
    let middle = (x.len().div_ceil(ELEMENTS) / 2) * ELEMENTS;
    let (left, right) = x.split_at(middle);
    let (left, right) = rayon::join(|| tree(left), || tree(right));
    left + right
}

struct Part<'a>(&'a [f32]);

impl Kernel for Part<'_> {
    type Output = f64;
    #[inline(always)]
    fn run<I: Isa>(self) -> f64 {
        let mut sums = [0f64; 32];
        for x in self.0.chunks(32) {
            for (s, &x) in sums.iter_mut().zip(x) {
                *s += f64::from(x) * f64::from(x);
            }
        }
        sums.iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cases::{normal, same_on_threads};
    use crate::ops::sum_sq::reference;

    #[test]
    fn as_the_reference() -> Result<()> {
        for n in [0, 1, 31, ELEMENTS - 1, ELEMENTS, ELEMENTS + 1, 5 * ELEMENTS + 3] {
            let x = normal::<f32>(n as u64, n, 1.0);
            let mut want = [f64::NAN];
            reference(SumSq { out: &mut want, x: &x })?;
            let got = same_on_threads(|| {
                let mut got = [f64::NAN];
                sum_sq(SumSq { out: &mut got, x: &x }).map(|()| got[0].to_bits()).expect("a sum")
            });
            let got = f64::from_bits(got);
            assert!((got - want[0]).abs() <= 1e-13 * want[0], "{n}: {got}, expected {}", want[0]);
        }
        Ok(())
    }
}
