// embed: y[t, d] = E[ids[t], d]
//
// A block a token (gridDim.x = tokens), any number of warps; a thread copies every blockDim.x-th group of eight columns.
// ld, the leading dimension of both matrices, is a multiple of 8; width may be anything up to it; padding becomes zero
// up to the next multiple of 8. Nothing rounds.
#include "kernel.cuh"
#include "rows.cuh"

extern "C" __global__ void __launch_bounds__(1024)
    embed(bf16* y, const bf16* table, const uint32_t* ids, int width, int ld) {
    const size_t to = size_t(blockIdx.x) * ld, from = size_t(ids[blockIdx.x]) * ld;
    for (int d = 8 * threadIdx.x; d < width; d += 8 * blockDim.x) {
        float v[8];
        load8(v, table + from + d, width - d);
        store8(y + to + d, v, width - d);
    }
}
KERNEL(embed)
