// swiglu: h = silu(gate) ∘ up, silu(z) = z / (1 + e^−z)
// swiglu_bwd: dgate = dh ∘ up ∘ σ(gate)(1 + gate(1 − σ(gate))), dup = dh ∘ silu(gate), in the places of gate and up
//
// A thread computes eight neighbouring columns of one row: gridDim.x = tokens, gridDim.y · blockDim.x · 8 ≥ width.
// ld, the leading dimension of all matrices, is a multiple of 8; width may be anything up to it; padding becomes zero up
// to the next multiple of 8. In f32; each output rounds once.
#include "kernel.cuh"
#include "rows.cuh"
#include "sigmoid.cuh"

extern "C" __global__ void __launch_bounds__(256)
    swiglu(bf16* h, const bf16* gate, const bf16* up, int width, int ld) {
    const int column = 8 * (blockIdx.y * blockDim.x + threadIdx.x), valid = width - column;
    if (valid <= 0) return;
    const size_t at = size_t(blockIdx.x) * ld + column;

    float z[8], u[8];
    load8(z, gate + at, valid);
    load8(u, up + at, valid);
#pragma unroll
    for (int i = 0; i < 8; i++) u[i] *= z[i] * sigmoid(z[i]);
    store8(h + at, u, valid);
}
KERNEL(swiglu)

extern "C" __global__ void __launch_bounds__(256)
    swiglu_bwd(bf16* gate, bf16* up, const bf16* dh, int width, int ld) {
    const int column = 8 * (blockIdx.y * blockDim.x + threadIdx.x), valid = width - column;
    if (valid <= 0) return;
    const size_t at = size_t(blockIdx.x) * ld + column;

    float gradient[8], z[8], u[8];
    load8(gradient, dh + at, valid);
    load8(z, gate + at, valid);
    load8(u, up + at, valid);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float s = sigmoid(z[i]);
        u[i] *= gradient[i] * s * (1.0f + z[i] * (1.0f - s));
        gradient[i] *= z[i] * s;
    }
    store8(gate + at, u, valid);
    store8(up + at, gradient, valid);
}
KERNEL(swiglu_bwd)
