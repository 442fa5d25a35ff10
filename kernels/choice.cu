// choice: out[p] = sign · (logits[r, ids[p]] − lse(logits[r])) for the p in starts[r]..starts[r + 1]
//
// A block a row of logits, any number of warps. ld_v is a multiple of 8. In f32. A sign of −1 gives the loss.
#include "kernel.cuh"
#include "log_sum_exp.cuh"

extern "C" __global__ void __launch_bounds__(1024)
    choice(float* out, const float* logits, const uint32_t* ids, const uint32_t* starts, int vocab, int ld_v, float sign) {
    SHARED(LogSumExp, shared);
    const float* row = logits + size_t(blockIdx.x) * ld_v;
    const float lse = log_sum_exp(row, vocab, shared);
    for (uint32_t p = starts[blockIdx.x] + threadIdx.x; p < starts[blockIdx.x + 1]; p += blockDim.x)
        out[p] = sign * (row[ids[p]] - lse);
}
KERNEL(choice)
KERNEL_SHARED(choice, LogSumExp)
