// adamw: g' = g · clip, clip = min(1, max_norm / (√norm_sq + 1e-6)) or 1 where max_norm is 0,
// m += (1−β₁)(g' − m), v = β₂v + (1−β₂)g'·g', p = p·decay + (step · m) / (√v / root + eps)
//
// A thread takes every (gridDim.x · blockDim.x)-th group of four elements; any grid. All arrays start at a multiple of
// 16 bytes. clip in f64, rounded once; elements in f32 in this order, every operation rounded on its own but for the sums
// of m and v, which are fused.
#include "kernel.cuh"

struct Factors {
    float clip, decay, new1, old2, new2, step, root, eps;
};
struct Shared {
    float clip;
};

__device__ __forceinline__ void update(float& p, float& m, float& v, float g, const Factors& f) {
    g = __fmul_rn(g, f.clip);
    m = __fmaf_rn(f.new1, __fsub_rn(g, m), m);
    v = __fmaf_rn(__fmul_rn(f.new2, g), g, __fmul_rn(f.old2, v));
    const float root = __fadd_rn(__fdiv_rn(__fsqrt_rn(v), f.root), f.eps);
    p = __fadd_rn(__fmul_rn(p, f.decay), __fdiv_rn(__fmul_rn(f.step, m), root));
}

extern "C" __global__ void __launch_bounds__(256)
    adamw(float* params, float* m, float* v, const float* grads, const double* norm_sq, int64_t n, double max_norm,
          float decay, float new1, float old2, float new2, float step, float root, float eps) {
    SHARED(Shared, shared);
    if (threadIdx.x == 0) {
        const double clip = max_norm / (sqrt(norm_sq[0]) + 1e-6);
        shared.clip = max_norm == 0.0 ? 1.0f : __double2float_rn(min(max(clip, 0.0), 1.0));
    }
    __syncthreads();
    const Factors f = {shared.clip, decay, new1, old2, new2, step, root, eps};

    const int64_t stride = int64_t(gridDim.x) * blockDim.x, first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    for (int64_t i = first; i < n / 4; i += stride) {
        float4 p4 = reinterpret_cast<float4*>(params)[i], m4 = reinterpret_cast<float4*>(m)[i];
        float4 v4 = reinterpret_cast<float4*>(v)[i];
        const float4 g4 = reinterpret_cast<const float4*>(grads)[i];
        update(p4.x, m4.x, v4.x, g4.x, f);
        update(p4.y, m4.y, v4.y, g4.y, f);
        update(p4.z, m4.z, v4.z, g4.z, f);
        update(p4.w, m4.w, v4.w, g4.w, f);
        reinterpret_cast<float4*>(params)[i] = p4;
        reinterpret_cast<float4*>(m)[i] = m4;
        reinterpret_cast<float4*>(v)[i] = v4;
    }
    if (const int64_t i = n / 4 * 4 + first; i < n) update(params[i], m[i], v[i], grads[i], f);
}
KERNEL(adamw)
KERNEL_SHARED(adamw, Shared)
