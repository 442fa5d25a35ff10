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
    use crate::cpu::tests::on_threads;
    use crate::ops::cases::sum_sq::conforms;

    #[test]
    fn as_the_reference() {
        conforms(&on_threads());
    }
}
