// rope: with (a, b) = (x[t, h, k], x[t, h, k + K/2]) and row r = rows[t] of the tables, in place,
// x[t, h, k] = a·cos[r, k] − b·sin[r, k], x[t, h, k + K/2] = b·cos[r, k] + a·sin[r, k]; sign = −1 rotates back
//
// A block a token (gridDim.x = tokens), any number of warps. Where K divides by 16, a thread rotates every blockDim.x-th
// group of eight pairs, else every blockDim.x-th pair. K is even; ld is a multiple of 8. Products in f32, each rounded on
// its own as transformers does; x rounds once.
#include "kernel.cuh"
#include "rows.cuh"

__device__ __forceinline__ void rotate(float& a, float& b, float cos, float sin) {
    const float low = a, high = b;
    a = __fsub_rn(__fmul_rn(low, cos), __fmul_rn(high, sin));
    b = __fadd_rn(__fmul_rn(high, cos), __fmul_rn(low, sin));
}

extern "C" __global__ void __launch_bounds__(1024)
    rope(bf16* x, const float* cos, const float* sin, const uint32_t* rows, int heads, int dim, int ld, float sign) {
    const int half = dim / 2;
    bf16* row = x + size_t(blockIdx.x) * ld;
    const size_t table = size_t(rows[blockIdx.x]) * half;

    if (dim % 16 == 0) {
        const int groups = half / 8;
        for (int i = threadIdx.x; i < heads * groups; i += blockDim.x) {
            const int k = 8 * (i % groups);
            bf16* low = row + i / groups * dim + k;
            float a[8], b[8], c[8], s[8];
            load8(a, low, 8);
            load8(b, low + half, 8);
            load8(c, cos + table + k, 8);
            load8(s, sin + table + k, 8);
#pragma unroll
            for (int j = 0; j < 8; j++) rotate(a[j], b[j], c[j], sign * s[j]);
            store8(low, a, 8);
            store8(low + half, b, 8);
        }
        return;
    }
    for (int i = threadIdx.x; i < heads * half; i += blockDim.x) {
        const int k = i % half;
        bf16* low = row + i / half * dim + k;
        float a = __bfloat162float(low[0]), b = __bfloat162float(low[half]);
        rotate(a, b, cos[table + k], sign * sin[table + k]);
        low[0] = __float2bfloat16_rn(a);
        low[half] = __float2bfloat16_rn(b);
    }
}
KERNEL(rope)
