// Rows of a matrix eight elements at a time. A bf16 row starts at a multiple of 16 bytes (the leading dimension is a
// multiple of 8), so that eight elements are one access; columns past the width are padding.
#pragma once
#include <cuda_bf16.h>

/// The eight elements at `p`, of which the first `valid` exist and the others count as zero.
__device__ __forceinline__ void load8(float (&v)[8], const __nv_bfloat16* p, int valid) {
    uint4 bits = *reinterpret_cast<const uint4*>(p);
    const unsigned pairs[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        v[2 * i] = 2 * i < valid ? __uint_as_float(pairs[i] << 16) : 0.0f;
        v[2 * i + 1] = 2 * i + 1 < valid ? __uint_as_float(pairs[i] & 0xffff0000u) : 0.0f;
    }
}

/// Of an array of f32 that starts at a multiple of 16 bytes and has no padding: nothing past `valid` is read.
__device__ __forceinline__ void load8(float (&v)[8], const float* p, int valid) {
    if (valid >= 8) {
        const float4 low = reinterpret_cast<const float4*>(p)[0], high = reinterpret_cast<const float4*>(p)[1];
        v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
        v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = i < valid ? p[i] : 0.0f;
    }
}

/// Rounds eight elements to bf16 and stores them; those past `valid` are padding and become zero.
__device__ __forceinline__ void store8(__nv_bfloat16* p, const float (&v)[8], int valid) {
    unsigned pairs[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const unsigned low = 2 * i < valid ? __bfloat16_as_ushort(__float2bfloat16_rn(v[2 * i])) : 0u;
        const unsigned high = 2 * i + 1 < valid ? __bfloat16_as_ushort(__float2bfloat16_rn(v[2 * i + 1])) : 0u;
        pairs[i] = low | high << 16;
    }
    *reinterpret_cast<uint4*>(p) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}
