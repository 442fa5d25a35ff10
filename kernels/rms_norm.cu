// rms_norm: y[t, d] = x[t, d] · rstd[t] · w[d], rstd[t] = 1 / sqrt(mean_d x[t, d]² + eps)
// rms_norm_bwd: dx = residual + rstd · (w∘dy − x̂ · mean_d(w∘dy∘x̂)), x̂ = x · rstd; residual null for none
//
// A block a row (gridDim.x = tokens), any number of warps; a thread takes every blockDim.x-th group of eight columns.
// ld, the leading dimension of all bf16 matrices, is a multiple of 8; width may be anything up to it; padding becomes
// zero up to the next multiple of 8. Sums in f32, y and dx round once. The second reading of a row hits the L1 cache.
#include "kernel.cuh"
#include "reduce.cuh"
#include "rows.cuh"

struct Shared {
    float sums[32];
};

extern "C" __global__ void __launch_bounds__(1024)
    rms_norm(bf16* y, float* rstd, const bf16* x, const float* w, int width, int ld, float eps) {
    SHARED(Shared, shared);
    const size_t row = size_t(blockIdx.x) * ld;
    const int first = 8 * threadIdx.x, step = 8 * blockDim.x;

    float squares = 0.0f;
    for (int d = first; d < width; d += step) {
        float v[8];
        load8(v, x + row + d, width - d);
#pragma unroll
        for (int i = 0; i < 8; i++) squares += v[i] * v[i];
    }
    const float scale = 1.0f / sqrtf(block_sum(squares, shared.sums) / width + eps);
    if (threadIdx.x == 0) rstd[blockIdx.x] = scale;

    for (int d = first; d < width; d += step) {
        float v[8], weight[8];
        load8(v, x + row + d, width - d);
        load8(weight, w + d, width - d);
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] *= scale * weight[i];
        store8(y + row + d, v, width - d);
    }
}
KERNEL(rms_norm)
KERNEL_SHARED(rms_norm, Shared)

extern "C" __global__ void __launch_bounds__(1024)
    rms_norm_bwd(bf16* dx, const bf16* dy, const bf16* residual, const bf16* x, const float* rstd, const float* w, int width,
                 int ld) {
    SHARED(Shared, shared);
    const size_t row = size_t(blockIdx.x) * ld;
    const int first = 8 * threadIdx.x, step = 8 * blockDim.x;
    const float scale = rstd[blockIdx.x];

    float products = 0.0f;
    for (int d = first; d < width; d += step) {
        float v[8], gradient[8], weight[8];
        load8(v, x + row + d, width - d);
        load8(gradient, dy + row + d, width - d);
        load8(weight, w + d, width - d);
#pragma unroll
        for (int i = 0; i < 8; i++) products += weight[i] * gradient[i] * v[i];
    }
    // mean_d(w∘dy∘x̂) · rstd, the factor of x
    const float mean = block_sum(products, shared.sums) / width * scale * scale;

    for (int d = first; d < width; d += step) {
        float v[8], gradient[8], weight[8], past[8] = {};
        load8(v, x + row + d, width - d);
        load8(gradient, dy + row + d, width - d);
        load8(weight, w + d, width - d);
        if (residual) load8(past, residual + row + d, width - d);
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = past[i] + scale * (weight[i] * gradient[i] - v[i] * mean);
        store8(dx + row + d, v, width - d);
    }
}
KERNEL(rms_norm_bwd)
KERNEL_SHARED(rms_norm_bwd, Shared)
