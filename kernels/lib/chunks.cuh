// Rows of 16-byte chunks in shared memory, permuted so that eight rows of one chunk column lie in 32 different banks.
#pragma once

/// Where chunk `chunk` of row `row` lies, in bf16 elements, in rows of `chunks` chunks.
template <int chunks>
__device__ __forceinline__ int place(int row, int chunk) {
    constexpr int line = chunks >= 8 ? 1 : 8 / chunks; // rows in 128 bytes
    return (row * chunks + (chunk ^ (row / line & (chunks >= 8 ? 7 : chunks - 1)))) * 8;
}
