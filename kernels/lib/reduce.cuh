// Sums and maxima over a warp and a block, in an order that depends on nothing but the block's size. T is float or double.
#pragma once

/// The sum over the warp's 32 lanes, the same in each.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
    for (int flip = 16; flip > 0; flip >>= 1) value += __shfl_xor_sync(0xffffffffu, value, flip);
    return value;
}

/// The sum over the block's threads, the same in each. `sums` is shared and has a place a warp; before it is used
/// again, the block must have met at a barrier.
template <class T>
__device__ __forceinline__ T block_sum(T value, T* sums) {
    value = warp_sum(value);
    const int warps = blockDim.x / 32;
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
    __syncthreads();
    T sum = sums[0];
    for (int warp = 1; warp < warps; warp++) sum += sums[warp];
    return sum;
}

/// The largest value of the block's threads, the same in each; `most` as `sums` of `block_sum`.
__device__ __forceinline__ float block_max(float value, float* most) {
#pragma unroll
    for (int flip = 16; flip > 0; flip >>= 1) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, flip));
    const int warps = blockDim.x / 32;
    if (threadIdx.x % 32 == 0) most[threadIdx.x / 32] = value;
    __syncthreads();
    float largest = most[0];
    for (int warp = 1; warp < warps; warp++) largest = fmaxf(largest, most[warp]);
    return largest;
}
