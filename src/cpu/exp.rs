//! The exponential function in f32, branch-free so that loops over it vectorise.

use super::simd::{Isa, fma};

/// `eˣ` within one unit in the last place; 0 below −87.69, where the result is no normal number, ∞ beyond 88.37, NaN
/// for NaN.
///
/// `eˣ = 2ⁿ eʳ` with n the integer next to x/ln 2 and |r| ≤ ln 2 / 2; `eʳ` is the polynomial of Cephes' `expf`.
#[inline(always)]
pub(super) fn exp<I: Isa>(x: f32) -> f32 {
    // Beyond these bounds n is −127 or 128, and 2ⁿ made from it 0 or ∞. Written so that NaN passes.
    let x = if x < -88.0 { -88.0 } else { x };
    let x = if x > 89.0 { 89.0 } else { x };
    // Adding 1.5 · 2²³ rounds to an integer and leaves it in the low bits; 127 more makes it the exponent of 2ⁿ.
    const ROUND: f32 = 12_582_912.0 + 127.0;
    let rounded = fma::<I>(x, std::f32::consts::LOG2_E, ROUND);
    let n = rounded - ROUND;
    // ln 2 in two parts; the first has 9 bits, so that n times it is exact.
    let r = fma::<I>(n, -0.693_359_4, x);
    let r = fma::<I>(n, 2.121_944_4e-4, r);
    let mut p = 1.987_569_1e-4;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_66, 0.5, 1.0, 1.0] {
        p = fma::<I>(p, r, c);
    }
    p * f32::from_bits(rounded.to_bits() << 23)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::simd::tests::Fused;

    struct Plain;
    impl Isa for Plain {
        const FMA: bool = false;
        const WIDE: bool = false;
    }

    fn worst<I: Isa>(most: f64) -> f64 {
        let mut worst = 0f64;
        let mut check = |x: f32| {
            let (got, want) = (f64::from(exp::<I>(x)), f64::from(x).exp());
            // One unit in the last place of the nearest f32.
            let ulp = 2f64.powi((want.log2().floor() as i32).max(-126) - 23);
            let err = (got - want).abs() / ulp;
            assert!(err <= most, "exp({x}) = {got}, expected {want}: {err} units");
            worst = worst.max(err);
        };
        (-873_000..883_000).for_each(|i| check(i as f32 * 1e-4));
        (-200_000..200_000).for_each(|i| check(i as f32 * 1e-9));
        worst
    }

    #[test]
    fn within_a_unit() {
        println!("fused {:.3}, plain {:.3}", worst::<Fused>(1.0), worst::<Plain>(2.0));
    }

    #[test]
    fn ends() {
        assert_eq!(exp::<Fused>(0.0), 1.0);
        assert_eq!(exp::<Fused>(-0.0), 1.0);
        assert_eq!(exp::<Fused>(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp::<Fused>(-1e30), 0.0);
        assert_eq!(exp::<Fused>(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp::<Fused>(89.0), f32::INFINITY);
        assert_eq!(exp::<Fused>(-87.7), 0.0);
        assert!(exp::<Fused>(88.37).is_finite());
        assert!(exp::<Fused>(-87.33) >= f32::MIN_POSITIVE);
        assert!(exp::<Fused>(f32::NAN).is_nan());
    }
}
