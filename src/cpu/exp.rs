//! The exponential function in f32, branch-free so that loops over it vectorise.

use std::f32::consts::{LN_2, LOG2_E};

use super::simd::{Isa, fma};

/// Added to a number it rounds it to an integer, which is left in the low bits with 127 more: the exponent of 2ⁿ.
const ROUND: f32 = 12_582_912.0 + 127.0;

/// `eˣ` within one unit in the last place; 0 below −87.69, where the result is no normal number, ∞ beyond 88.37, NaN
/// for NaN.
///
/// `eˣ = 2ⁿ eʳ` with n the integer next to x/ln 2 and |r| ≤ ln 2 / 2; `eʳ` is the polynomial of Cephes' `expf`.
#[inline(always)]
pub(super) fn exp<I: Isa>(x: f32) -> f32 {
    let x = within(x, -88.0, 89.0);
    let rounded = fma::<I>(x, LOG2_E, ROUND);
    let n = rounded - ROUND;
    // ln 2 in two parts; the first has 9 bits, so that n times it is exact.
    let r = fma::<I>(n, -0.693_359_4, x);
    let r = fma::<I>(n, 2.121_944_4e-4, r);
    let from = [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_66, 0.5, 1.0, 1.0];
    times_power::<I, 8>(from, r, rounded)
}

/// `2ˣ` within one unit in the last place, in fewer steps than [`exp`]; 0 below −126.5, where the result is no normal
/// number, ∞ from 127.5 on, NaN for NaN.
///
/// `2ˣ = 2ⁿ 2ʳ` with n the integer next to x; `2ʳ` is a polynomial whose largest relative error over |r| ≤ ½ is the least,
/// 2·10⁻⁹.
#[inline(always)]
pub(super) fn exp2<I: Isa>(x: f32) -> f32 {
    let x = within(x, -127.0, 128.0);
    let rounded = x + ROUND;
    let r = x - (rounded - ROUND);
    let from = [1.535_336_2e-4, 1.339_887_5e-3, 9.618_437e-3, 5.550_332_4e-2, 0.240_226_48, LN_2, 1.0];
    times_power::<I, 7>(from, r, rounded)
}

/// x between two bounds for which n is −127 and 128, and 2ⁿ made from it 0 and ∞; NaN passes.
#[inline(always)]
fn within(x: f32, least: f32, most: f32) -> f32 {
    let x = if x < least { least } else { x };
    if x > most { most } else { x }
}

/// A polynomial of r, its highest coefficient first, times 2ⁿ.
#[inline(always)]
fn times_power<I: Isa, const N: usize>(from: [f32; N], r: f32, rounded: f32) -> f32 {
    let mut p = from[0];
    for c in &from[1..] {
        p = fma::<I>(p, r, *c);
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

    fn worst(most: f64, f: fn(f32) -> f32, exact: fn(f64) -> f64, range: std::ops::Range<i32>) -> f64 {
        let mut worst = 0f64;
        let mut check = |x: f32| {
            let (got, want) = (f64::from(f(x)), exact(f64::from(x)));
            // One unit in the last place of the nearest f32.
            let ulp = 2f64.powi((want.log2().floor() as i32).max(-126) - 23);
            let err = (got - want).abs() / ulp;
            assert!(err <= most, "at {x}: {got}, expected {want}: {err} units");
            worst = worst.max(err);
        };
        range.for_each(|i| check(i as f32 * 1e-4));
        (-200_000..200_000).for_each(|i| check(i as f32 * 1e-9));
        worst
    }

    #[test]
    fn within_a_unit() {
        let of_e = |most, f| worst(most, f, f64::exp, -873_000..883_000);
        println!("fused {:.3}, plain {:.3}", of_e(1.0, exp::<Fused>), of_e(2.0, exp::<Plain>));
        let of_2 = |most, f| worst(most, f, f64::exp2, -1_260_000..1_274_000);
        println!("fused {:.3}, plain {:.3}", of_2(1.0, exp2::<Fused>), of_2(2.0, exp2::<Plain>));
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

    #[test]
    fn ends_of_powers_of_two() {
        assert_eq!(
            [0.0, -0.0, 1.0, -126.0, 127.0].map(exp2::<Fused>),
            [1.0, 1.0, 2.0, f32::MIN_POSITIVE, 2f32.powi(127)]
        );
        assert_eq!([f32::NEG_INFINITY, -1e30, -126.6].map(exp2::<Fused>), [0.0; 3]);
        assert_eq!([f32::INFINITY, 1e30, 127.6].map(exp2::<Fused>), [f32::INFINITY; 3]);
        assert!(exp2::<Fused>(f32::NAN).is_nan());
    }
}
