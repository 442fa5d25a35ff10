//! Numbers of a file, little-endian in BF16, F16 or F32, to f32 and f64 and back.

use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use half::{bf16, f16};

use crate::cpu::simd::{Isa, Kernel, run};
use crate::tensor::{DType, Real};

/// `out[i] = f(from[i])`.
struct Each<'a, O, X, F> {
    out: &'a mut [O],
    from: &'a [X],
    f: F,
}

impl<O, X: Copy, F: Fn(X) -> O> Kernel for Each<'_, O, X, F> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        self.out.iter_mut().zip(self.from).for_each(|(out, x)| *out = (self.f)(*x));
    }
}

/// `out[i] = bytes[i]`, exactly; `bytes` holds `out.len()` elements of `dtype` at any alignment.
///
/// # Panics
/// If the lengths differ.
pub fn widen(out: &mut [f32], bytes: &[u8], dtype: DType) {
    assert_eq!(bytes.len(), out.len() * dtype.size(), "bytes of {} elements of {dtype}", out.len());
    match dtype {
        DType::F32 => {
            run(Each { out, from: bytes.as_chunks::<4>().0, f: f32::from_le_bytes });
        }
        DType::BF16 => {
            run(Each { out, from: bytes.as_chunks::<2>().0, f: |b| bf16::from_le_bytes(b).to_f32() });
        }
        DType::F16 => {
            let mut half = [0u16; 1024];
            for (o, b) in out.chunks_mut(1024).zip(bytes.chunks(2048)) {
                let half = &mut half[..o.len()];
                for (h, b) in half.iter_mut().zip(b.as_chunks::<2>().0) {
                    *h = u16::from_le_bytes(*b);
                }
                half.reinterpret_cast::<f16>().convert_to_f32_slice(o);
            }
        }
    }
}

/// `out[i] = bytes[i]`, exactly; `bytes` holds `out.len()` elements of `dtype` at any alignment.
///
/// # Panics
/// If the lengths differ.
pub fn widen_f64(out: &mut [f64], bytes: &[u8], dtype: DType) {
    let mut buf = [0f32; 1024];
    assert_eq!(bytes.len(), out.len() * dtype.size(), "bytes of {} elements of {dtype}", out.len());
    for (o, b) in out.chunks_mut(1024).zip(bytes.chunks(1024 * dtype.size())) {
        let buf = &mut buf[..o.len()];
        widen(buf, b, dtype);
        run(Each { out: o, from: buf, f: f64::from });
    }
}

/// Appends `x`, each element rounded once to `dtype` (ties to even), to `out`.
pub fn narrow(out: &mut Vec<u8>, x: &[f32], dtype: DType) {
    match dtype {
        DType::F32 => append(out, x, f32::to_le_bytes),
        DType::BF16 => append(out, x, |v| bf16::from_f32(v).to_le_bytes()),
        DType::F16 => append(out, x, |v| f16::from_f32(v).to_le_bytes()),
    }
}

/// Appends `x`, each element rounded once to `dtype` (ties to even), to `out`.
pub fn narrow_f64(out: &mut Vec<u8>, x: &[f64], dtype: DType) {
    match dtype {
        DType::F32 => append(out, x, |v| (v as f32).to_le_bytes()),
        DType::BF16 => append(out, x, |v| <bf16 as Real>::from_f64(v).to_le_bytes()),
        DType::F16 => append(out, x, |v| <f16 as Real>::from_f64(v).to_le_bytes()),
    }
}

/// The bytes of `x`, each rounded once to `dtype`; or which element is then no finite number.
pub fn narrow_finite(x: &[f64], dtype: DType) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    narrow_f64(&mut bytes, x, dtype);
    match first_non_finite(&bytes, dtype) {
        None => Ok(bytes),
        Some(i) => Err(format!("would hold NaN or infinity at element {i} in {dtype}")),
    }
}

/// Appends the bytes of each element.
fn append<T: Copy, const N: usize>(out: &mut Vec<u8>, x: &[T], bytes: impl Fn(T) -> [u8; N]) {
    let start = out.len();
    out.resize(start + x.len() * N, 0);
    run(Each { out: out[start..].as_chunks_mut::<N>().0, from: x, f: bytes });
}

/// The index of the first NaN or infinity in `bytes`, elements of `dtype` at any alignment.
pub fn first_non_finite(bytes: &[u8], dtype: DType) -> Option<usize> {
    // An exponent of all ones. Blocks are folded without a branch, so that the loop becomes vector code.
    const BLOCK: usize = 4096;
    let scan = |block: &[u8]| match dtype {
        DType::F32 => block
            .as_chunks::<4>()
            .0
            .iter()
            .fold(false, |bad, b| bad | (u32::from_le_bytes(*b) & 0x7f80_0000 == 0x7f80_0000)),
        DType::BF16 => block
            .as_chunks::<2>()
            .0
            .iter()
            .fold(false, |bad, b| bad | (u16::from_le_bytes(*b) & 0x7f80 == 0x7f80)),
        DType::F16 => block
            .as_chunks::<2>()
            .0
            .iter()
            .fold(false, |bad, b| bad | (u16::from_le_bytes(*b) & 0x7c00 == 0x7c00)),
    };
    let block = bytes.chunks(BLOCK).position(scan)?;
    let at = block * BLOCK;
    let inside = bytes[at..].chunks(dtype.size()).position(scan)?;
    Some(at / dtype.size() + inside)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_survives_a_round_trip_at_any_alignment() {
        for dtype in [DType::BF16, DType::F16] {
            let mut bytes = vec![0u8];
            bytes.extend((0..=u16::MAX).flat_map(u16::to_le_bytes));
            let mut wide = vec![0f32; 65536];
            widen(&mut wide, &bytes[1..], dtype);
            let mut wide64 = vec![0f64; 65536];
            widen_f64(&mut wide64, &bytes[1..], dtype);
            let (mut back, mut back64) = (Vec::new(), Vec::new());
            narrow(&mut back, &wide, dtype);
            narrow_f64(&mut back64, &wide64, dtype);
            for i in 0..65536 {
                let x = match dtype {
                    DType::BF16 => bf16::from_bits(i as u16).to_f64(),
                    _ => f16::from_bits(i as u16).to_f64(),
                };
                if x.is_nan() {
                    assert!(wide[i].is_nan() && wide64[i].is_nan());
                    continue;
                }
                assert_eq!(f64::from(wide[i]), x);
                assert_eq!(wide64[i], x);
                assert_eq!(back[2 * i..2 * i + 2], bytes[1 + 2 * i..3 + 2 * i]);
                assert_eq!(back64[2 * i..2 * i + 2], bytes[1 + 2 * i..3 + 2 * i]);
            }
        }
    }

    #[test]
    fn f64_is_rounded_once() {
        // 1 + 2^-8 + 2^-30: to f32 first it would become a tie at 1 + 2^-8 and fall to 1.
        let x = 1.0 + 2f64.powi(-8) + 2f64.powi(-30);
        let mut out = Vec::new();
        narrow_f64(&mut out, &[x], DType::BF16);
        assert_eq!(bf16::from_le_bytes([out[0], out[1]]).to_f64(), 1.0 + 2f64.powi(-7));
        for (x, expected) in
            [(1.0 + 2f64.powi(-11) + 2f64.powi(-40), 1.0 + 2f64.powi(-10)), (1.0 + 2f64.powi(-11), 1.0)]
        {
            for sign in [1.0, -1.0] {
                out.clear();
                narrow_f64(&mut out, &[sign * x], DType::F16);
                assert_eq!(f16::from_le_bytes([out[0], out[1]]).to_f64(), sign * expected);
            }
        }
        out.clear();
        narrow_f64(&mut out, &[65519.999999999, 65520.0, 1e300], DType::F16);
        let got: Vec<f64> = out.chunks(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f64()).collect();
        assert_eq!(got, [65504.0, f64::INFINITY, f64::INFINITY]);
    }

    #[test]
    fn the_first_bad_number_is_found() {
        let n = 5000;
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                for at in [0, 1023, 1024, 2048, n - 1] {
                    let mut x = vec![1.5f32; n];
                    let mut bytes = Vec::new();
                    narrow(&mut bytes, &x, dtype);
                    assert_eq!(first_non_finite(&bytes, dtype), None);
                    x[at] = bad;
                    x[n - 1] = bad;
                    bytes.clear();
                    narrow(&mut bytes, &x, dtype);
                    assert_eq!(first_non_finite(&bytes, dtype), Some(at));
                }
            }
        }
    }
}
