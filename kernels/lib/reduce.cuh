// Sums over a warp and a block, in an order that depends on nothing but the block's size.
#pragma once

/// The sum over the warp's 32 lanes, the same in each.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int flip = 16; flip > 0; flip >>= 1) value += __shfl_xor_sync(0xffffffffu, value, flip);
    return value;
}

/// The sum over the block's threads, the same in each. `sums` is shared and has a place a warp; before it is used
/// again, the block must have met at a barrier.
__device__ __forceinline__ float block_sum(float value, float* sums) {
    value = warp_sum(value);
    const int warps = blockDim.x / 32;
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
    __syncthreads();
    float sum = sums[0];
    for (int warp = 1; warp < warps; warp++) sum += sums[warp];
    return sum;
}
