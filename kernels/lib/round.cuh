// Numbers of a weight's dtype from and to f64, rounded once, to nearest even. f16 is its 16 bits: no header of the
// toolkit's is needed for it.
#pragma once
#include <cuda_bf16.h>
#include <cstdint>

/// IEEE half.
struct Half {
    uint16_t bits;
};

/// `x` in f32, or its neighbour with an odd last bit where it is not exact: rounded again, to 16 bits, that gives what one
/// rounding of `x` would.
__device__ __forceinline__ float to_odd(double x) {
    const float near = float(x);
    const unsigned bits = __float_as_uint(near);
    if (double(near) == x || !isfinite(near) || bits & 1) return near;
    return __uint_as_float(fabs(double(near)) < fabs(x) ? bits + 1 : bits - 1);
}

__device__ __forceinline__ double widen(float x) { return x; }
__device__ __forceinline__ double widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ double widen(Half x) {
    const unsigned bits = (x.bits & 0x7fffu) << 13;
    // The exponent's bias is 112 less; subnormal numbers come out right too, and of infinity the exponent is all ones.
    const float magnitude = bits < 0x0f800000u ? __uint_as_float(bits) * 0x1p112f : __uint_as_float(bits | 0x7f800000u);
    return x.bits & 0x8000u ? -magnitude : magnitude;
}

__device__ __forceinline__ void narrow(float& to, double x) { to = float(x); }
__device__ __forceinline__ void narrow(__nv_bfloat16& to, double x) { to = __float2bfloat16_rn(to_odd(x)); }
__device__ __forceinline__ void narrow(Half& to, double x) {
    const unsigned bits = __float_as_uint(to_odd(x)), magnitude = bits & 0x7fffffffu;
    unsigned half;
    if (magnitude >= 0x47800000u)
        half = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    else if (magnitude < 0x38800000u) // subnormal: half a unit in the last place of 0.5 is half of theirs
        half = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u;
    else
        half = (magnitude + 0xfffu + (magnitude >> 13 & 1) - 0x38000000u) >> 13;
    to.bits = uint16_t((bits >> 16 & 0x8000u) | half);
}
