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
    use std::ops::Range;

    use super::*;
    use crate::cpu::simd::Kernel;
    use crate::cpu::simd::tests::{loops, run_on};

    /// Each number's exponential, or its power of two.
    struct Each<'a> {
        x: &'a mut [f32],
        of_two: bool,
    }

    impl Kernel for Each<'_> {
        type Output = bool;
        #[inline(always)]
        fn run<I: Isa>(self) -> bool {
            self.x.iter_mut().for_each(|x| *x = if self.of_two { exp2::<I>(*x) } else { exp::<I>(*x) });
            I::FMA
        }
    }

    fn check(of_two: bool, exact: fn(f64) -> f64, range: Range<i32>) {
        let near = (-200_000..200_000).map(|i| i as f32 * 1e-9);
        let from: Vec<f32> = range.map(|i| i as f32 * 1e-4).chain(near).collect();
        for set in loops() {
            let mut got = from.clone();
            let most = if run_on(set, Each { x: &mut got, of_two }) { 1.0 } else { 2.0 };
            for (x, got) in from.iter().zip(got) {
                let want = exact(f64::from(*x));
                // One unit in the last place of the nearest f32.
                let ulp = 2f64.powi((want.log2().floor() as i32).max(-126) - 23);
                let err = (f64::from(got) - want).abs() / ulp;
                assert!(err <= most, "{}, at {x}: {got}, expected {want}: {err} units", set.name());
            }
        }
    }

    #[test]
    fn within_a_unit() {
        check(false, f64::exp, -873_000..883_000);
        check(true, f64::exp2, -1_260_000..1_274_000);
    }

    /// Each set's results for some numbers.
    fn each(of_two: bool, from: &[f32]) -> impl Iterator<Item = Vec<f32>> {
        loops().map(move |set| {
            let mut x = from.to_vec();
            run_on(set, Each { x: &mut x, of_two });
            x
        })
    }

    #[test]
    fn ends() {
        const INF: f32 = f32::INFINITY;
        for got in each(false, &[0.0, -0.0, -INF, -1e30, INF, 89.0, -87.7]) {
            assert_eq!(got, [1.0, 1.0, 0.0, 0.0, INF, INF, 0.0]);
        }
        for got in each(false, &[88.37, -87.33, f32::NAN]) {
            assert!(got[0].is_finite() && got[1] >= f32::MIN_POSITIVE && got[2].is_nan(), "{got:?}");
        }
    }

    #[test]
    fn ends_of_powers_of_two() {
        const INF: f32 = f32::INFINITY;
        for got in each(true, &[0.0, -0.0, 1.0, -126.0, 127.0, -INF, -1e30, -126.6, INF, 1e30, 127.6]) {
            let largest = 2f32.powi(127);
            assert_eq!(got, [1.0, 1.0, 2.0, f32::MIN_POSITIVE, largest, 0.0, 0.0, 0.0, INF, INF, INF]);
        }
        assert!(each(true, &[f32::NAN]).all(|got| got[0].is_nan()));
    }
}
