// What the attention kernels share: who sees whom, the rows of q, k and v, and products of tiles in shared memory.
//
// A segment of n queries has n · H/G pairs of a query and a head for each key/value head g: pair p is query p / (H/G)
// and head g · H/G + p % (H/G), and sees the segment's first past + p / (H/G) + 1 keys. A block takes a run of pairs of one
// segment, so that all heads of a group share the keys that it loads. Heads are H/G and G; K, the head width, is even.
#pragma once
#include "kernel.cuh"
#include "ptx.cuh"

namespace attention {

constexpr int threads = 128;
/// Columns after a row of shared memory: rows are an odd multiple of 16 bytes apart, so that ldmatrix has no conflicts.
constexpr int gap = 8;
constexpr float log2_e = 1.4426950408889634f;

/// An entry of the list of tiles.
struct Tile {
    /// The tile's first pair, or, for gradients of keys, its first key.
    uint32_t first;
    /// Pairs of the segment.
    uint32_t pairs;
    /// Row of q of its first query.
    uint32_t q;
    /// Row of k and v of that query's key.
    uint32_t own;
    /// Keys before its own.
    uint32_t past;
    /// Where in the list, in words, its past lies: a first row and a number of rows for each run.
    uint32_t runs;
};

/// The row of k and v of key `u`.
__device__ __forceinline__ uint32_t key_row(const Tile& tile, const uint32_t* list, uint32_t u) {
    if (u >= tile.past) return tile.own + (u - tile.past);
    const uint32_t* run = list + tile.runs;
    while (u >= run[1]) u -= run[1], run += 2;
    return run[0] + u;
}

/// A number of bytes as a type.
template <int bytes>
struct Bytes {
    static constexpr int value = bytes;
};

/// Rows of `from` to be copied to shared memory.
template <int WIDTH>
struct Copy {
    bf16 (*to)[WIDTH + gap];
    const bf16* from;
};

/// Starts to copy `ROWS` rows of `dim` columns of each matrix; row r starts at element `offset(r)`. Columns from dim to
/// WIDTH become zero, as do rows whose offset is negative.
template <int ROWS, int WIDTH, int COUNT, class Offset>
__device__ __forceinline__ void copy_rows(const Copy<WIDTH> (&copies)[COUNT], int dim, Offset offset) {
    const auto copy = [&](auto bytes, int i) {
        constexpr int columns = decltype(bytes)::value / 2, pieces = WIDTH / columns;
        const int r = i / pieces, c = columns * (i % pieces);
        const int64_t row = offset(r);
        const bool there = row >= 0 && c < dim;
#pragma unroll
        for (int j = 0; j < COUNT; j++)
            ptx::copy_async<2 * columns>(&copies[j].to[r][c], copies[j].from + (there ? row + c : 0), there ? 2 * columns : 0);
    };
    if (dim % 8 == 0) {
#pragma unroll 2
        for (int i = threadIdx.x; i < ROWS * WIDTH / 8; i += threads) copy(Bytes<16>{}, i);
    } else {
        for (int i = threadIdx.x; i < ROWS * WIDTH / 2; i += threads) copy(Bytes<4>{}, i);
    }
}

/// Writes `COLUMNS` of the `dim` columns of the warp's `ROWS` rows from shared memory to where `row(r)` says; not where it
/// is null.
template <int ROWS, int COLUMNS, int WIDTH, class Row>
__device__ __forceinline__ void write_rows(const bf16 (*from)[WIDTH + gap], int column, int dim, Row row) {
    const int lane = threadIdx.x % 32;
    if (dim % 8 == 0) {
        constexpr int pieces = COLUMNS / 8;
        for (int i = lane; i < ROWS * pieces; i += 32) {
            const int r = i / pieces, c = column + 8 * (i % pieces);
            bf16* to = row(r);
            if (to && c < dim) *reinterpret_cast<uint4*>(to + c) = *reinterpret_cast<const uint4*>(&from[r][c]);
        }
    } else {
        constexpr int pieces = COLUMNS / 2;
        for (int i = lane; i < ROWS * pieces; i += 32) {
            const int r = i / pieces, c = column + 2 * (i % pieces);
            bf16* to = row(r);
            if (to && c < dim) *reinterpret_cast<uint32_t*>(to + c) = *reinterpret_cast<const uint32_t*>(&from[r][c]);
        }
    }
}

/// Two floats rounded to bf16, the first in the low half.
__device__ __forceinline__ uint32_t pack(float low, float high) {
    return uint32_t(__bfloat16_as_ushort(__float2bfloat16_rn(low))) |
           uint32_t(__bfloat16_as_ushort(__float2bfloat16_rn(high))) << 16;
}

/// c[16 · M, 8 · N] += a[16 · M rows, WIDTH] · b[8 · N rows, WIDTH]ᵀ, both in shared memory.
template <int M, int N, int WIDTH>
__device__ __forceinline__ void multiply(float (&c)[M][N][4], const bf16 (*a)[WIDTH + gap], const bf16 (*b)[WIDTH + gap]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < WIDTH; k += 16) {
        uint32_t left[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) ptx::ldmatrix_x4(left[m], &a[16 * m + lane % 16][k + lane / 16 * 8]);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            uint32_t right[4];
            ptx::ldmatrix_x4(right, &b[8 * n + lane % 8 + lane / 16 * 8][k + lane / 8 % 2 * 8]);
#pragma unroll
            for (int m = 0; m < M; m++) {
                ptx::mma_m16n8k16(c[m][n], left[m], right[0], right[1]);
                ptx::mma_m16n8k16(c[m][n + 1], left[m], right[2], right[3]);
            }
        }
    }
}

/// c[16 · M, 8 · COLUMNS] += p[16 · M, 8 · N] · b[8 · N rows, columns of WIDTH]; p lies as the result of `multiply` and rounds to bf16.
template <int M, int N, int COLUMNS, int WIDTH>
__device__ __forceinline__ void multiply_add(float (&c)[M][COLUMNS][4], const float (&p)[M][N][4], const bf16 (*b)[WIDTH + gap],
                                             int column) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < N; k += 2) {
        uint32_t left[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) {
            left[m][0] = pack(p[m][k][0], p[m][k][1]);
            left[m][1] = pack(p[m][k][2], p[m][k][3]);
            left[m][2] = pack(p[m][k + 1][0], p[m][k + 1][1]);
            left[m][3] = pack(p[m][k + 1][2], p[m][k + 1][3]);
        }
#pragma unroll
        for (int n = 0; n < COLUMNS; n += 2) {
            uint32_t right[4];
            ptx::ldmatrix_x4_trans(right, &b[8 * k + lane % 16][column + 8 * n + lane / 16 * 8]);
#pragma unroll
            for (int m = 0; m < M; m++) {
                ptx::mma_m16n8k16(c[m][n], left[m], right[0], right[1]);
                ptx::mma_m16n8k16(c[m][n + 1], left[m], right[2], right[3]);
            }
        }
    }
}

/// Rounds c[16 · M, 8 · N] to the warp's rows in shared memory, times `factor(row)`.
template <int M, int N, int WIDTH, class Factor>
__device__ __forceinline__ void round_rows(bf16 (*to)[WIDTH + gap], const float (&c)[M][N][4], int column, Factor factor) {
    const int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float by = factor(m, i);
#pragma unroll
            for (int n = 0; n < N; n++)
                *reinterpret_cast<uint32_t*>(&to[16 * m + 8 * i + group][column + 8 * n + 2 * member]) =
                    pack(c[m][n][2 * i] * by, c[m][n][2 * i + 1] * by);
        }
}

} // namespace attention
