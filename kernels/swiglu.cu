// swiglu_bwd: dgate = dx ∘ up ∘ σ(gate)(1 + gate(1 − σ(gate))), dup = dx ∘ silu(gate), x = silu(gate) ∘ up, in the places of
// gate, up and dx; silu(z) = z σ(z)
//
// A thread computes eight neighbouring columns of one row: gridDim.x = tokens, gridDim.y · blockDim.x · 8 ≥ width.
// ld, the leading dimension of all matrices, is a multiple of 8; width may be anything up to it; padding becomes zero up
// to the next multiple of 8. In f32; each output rounds once.
#include "kernel.cuh"
#include "rows.cuh"
#include "sigmoid.cuh"

extern "C" __global__ void __launch_bounds__(256)
    swiglu_bwd(bf16* x, bf16* gate, bf16* up, int width, int ld) {
    const int column = 8 * (blockIdx.y * blockDim.x + threadIdx.x), valid = width - column;
    if (valid <= 0) return;
    const size_t at = size_t(blockIdx.x) * ld + column;

    float gradient[8], z[8], u[8], dgate[8];
    load8(gradient, x + at, valid);
    load8(z, gate + at, valid);
    load8(u, up + at, valid);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float s = sigmoid(z[i]), silu = z[i] * s;
        dgate[i] = gradient[i] * u[i] * s * (1.0f + z[i] * (1.0f - s));
        gradient[i] *= silu;
        u[i] *= silu;
    }
    store8(x + at, u, valid);
    store8(gate + at, dgate, valid);
    store8(up + at, gradient, valid);
}
KERNEL(swiglu_bwd)
