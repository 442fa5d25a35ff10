// The log-sum-exp of a row of f32 that a block reads once, in an order that depends on the row's and the block's size alone.
#pragma once
#include "ptx.cuh"
#include "reduce.cuh"
#include "rows.cuh"

struct LogSumExp {
    float most[32], sums[32];
};

/// eˣ for x up to 0.
__device__ __forceinline__ float exp_below(float x) { return ptx::exp2_approx(x * 1.4426950408889634f); }

/// ln Σ_v eˣ of `width` elements from `row`, a multiple of 16 bytes; the same in each thread.
__device__ __forceinline__ float log_sum_exp(const float* row, int width, LogSumExp& shared) {
    float most = -INFINITY, sum = 0.0f;
    for (int d = 8 * threadIdx.x; d < width; d += 8 * blockDim.x) {
        float v[8], larger = most;
        load8(v, row + d, width - d);
#pragma unroll
        for (int i = 0; i < 8; i++) larger = fmaxf(larger, i < width - d ? v[i] : -INFINITY);
        sum *= exp_below(most - larger);
#pragma unroll
        for (int i = 0; i < 8; i++) sum += i < width - d ? exp_below(v[i] - larger) : 0.0f;
        most = larger;
    }
    const float largest = block_max(most, shared.most);
    // A thread without elements has a sum of 0 at a maximum of −∞.
    return largest + logf(block_sum(sum * exp_below(most - largest), shared.sums));
}
