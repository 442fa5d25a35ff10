// Tiles of a matrix product by warpgroups: C[m, n] += Σ_k A[m, k] · B[k, n], bf16 operands, f32 sums. For Hopper.
//
// K runs through any number of segments, each with operands of its own: an adapter is one more segment, of as many steps
// of k16 as its rank needs. A block has three warpgroups: one thread of the first copies tiles of 64 k to a ring of four
// stages, the other two multiply them, 64 of the tile's 128 rows each by all 256 columns. Blocks stay and take tile after tile,
// so that the next one's operands arrive while results are written.
// A tensor map names each operand: what lies past the edges of a matrix, or past its K, is zero in shared memory and never
// read from memory. A is [m, k] with k contiguous; B is [n, k], or, `across`, [k, n].
#pragma once
#include "chunks.cuh"
#include "fragments.cuh"
#include "kernel.cuh"
#include "ptx_sm90.cuh"

namespace warpgroups {

constexpr int ROWS = 128, COLUMNS = 256, DEPTH = 64, STAGES = 4;
constexpr int MULTIPLIERS = ROWS / 64, THREADS = 128 * (1 + MULTIPLIERS);
/// Columns that a warp writes at a time.
constexpr int PASS = 128;
/// Boxes of operands: rows of DEPTH elements of A and B; `across`, DEPTH rows of 64 columns.
constexpr int BOX = 128, BOX_ACROSS = 64;

struct Ring {
    bf16 a[STAGES][ROWS * DEPTH];
    bf16 b[STAGES][COLUMNS * DEPTH];
    bf16 results[4 * MULTIPLIERS][16 * PASS]; // of each warp that multiplies
    uint64_t full[STAGES], empty[STAGES];
};

/// `k` steps of K: rows of A from `row` on; the first 128 columns of B from `column[0]` of `b[0]` on, the others from
/// `column[1]` of `b[1]`; `across`, all from `column[0]` of `b[0]`.
struct Segment {
    const ptx::TensorMap* a;
    const ptx::TensorMap* b[2];
    int row, column[2], k;
};

/// A place in the ring, and the parity of the phase in which its stage becomes full.
struct Stage {
    int slot = 0;
    unsigned parity = 0;
    __device__ __forceinline__ void advance() {
        if (++slot == STAGES) slot = 0, parity ^= 1;
    }
};

/// By all threads of the block, first.
__device__ __forceinline__ void open(Ring& ring) {
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            ptx::mbarrier_init(&ring.full[i], 1);
            ptx::mbarrier_init(&ring.empty[i], 4 * MULTIPLIERS);
        }
        ptx::fence_proxy_async();
    }
    __syncthreads();
}

/// Copies a segment's tiles, by one thread.
template <bool across>
__device__ __forceinline__ void copy(Ring& ring, Stage& stage, const Segment& segment) {
    for (int k = 0; k < segment.k; k += DEPTH) {
        uint64_t* full = &ring.full[stage.slot];
        bf16 *a = ring.a[stage.slot], *b = ring.b[stage.slot];
        ptx::mbarrier_wait(&ring.empty[stage.slot], stage.parity ^ 1);
        ptx::mbarrier_arrive_expect(full, sizeof ring.a[0] + sizeof ring.b[0]);
        ptx::copy_tile(a, *segment.a, full, k, segment.row);
        if constexpr (across) {
#pragma unroll
            for (int column = 0; column < COLUMNS; column += BOX_ACROSS)
                ptx::copy_tile(b + column * DEPTH, *segment.b[0], full, segment.column[0] + column, k);
        } else {
            ptx::copy_tile(b, *segment.b[0], full, k, segment.column[0]);
            ptx::copy_tile(b + BOX * DEPTH, *segment.b[1], full, k, segment.column[1]);
        }
        stage.advance();
    }
}

/// What a thread of the warpgroups that multiply holds.
template <bool across>
struct Product {
    /// Of 64 rows: d[4 · j + i] is element i of C of columns 8j.. in fragments.cuh.
    float d[COLUMNS / 2];
    Stage stage;
    int held = -1; // the slot that the newest products read

    __device__ __forceinline__ static int warp() { return threadIdx.x / 32 - 4; }

    /// Gives the slot that was held back to who copies.
    __device__ __forceinline__ void give_back(Ring& ring) {
        // Each warp for itself: wgmma does not make the four wait for each other.
        if (held >= 0 && threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&ring.empty[held]);
        held = -1;
    }

    /// A new tile.
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (float& sum : d) sum = 0.0f;
    }

    /// Adds the product of a segment of `k` steps, of which the last tile may still be under way afterwards.
    __device__ __forceinline__ void multiply(Ring& ring, int k) {
#pragma unroll 1
        for (; k > 0; k -= DEPTH) {
            ptx::mbarrier_wait(&ring.full[stage.slot], stage.parity);
            const uint64_t a = ptx::swizzled(ring.a[stage.slot] + warp() / 4 * 64 * DEPTH);
            const uint64_t b = ptx::swizzled(ring.b[stage.slot], across ? BOX_ACROSS * 2 * DEPTH : 16);
            constexpr int step_a = 2, step_b = across ? 128 : 2;
            if (k > DEPTH - 16) {
                ptx::wgmma_fence();
#pragma unroll
                for (int step = 0; step < DEPTH / 16; step++)
                    ptx::wgmma<COLUMNS, across>(d, a + step_a * step, b + step_b * step);
                ptx::wgmma_commit();
                ptx::wgmma_wait<1>();
            } else {
                // One at a time: products under a condition within a group make the compiler run all one after another.
#pragma unroll 1
                for (int step = 0; 16 * step < k; step++) {
                    ptx::wgmma_fence();
                    ptx::wgmma<COLUMNS, across>(d, a + step_a * step, b + step_b * step);
                    ptx::wgmma_commit();
                    ptx::wgmma_wait<1>();
                }
            }
            give_back(ring);
            held = stage.slot;
            stage.advance();
        }
    }

    /// Waits until d is the sum.
    __device__ __forceinline__ void finish(Ring& ring) {
        ptx::wgmma_wait<0>();
        give_back(ring);
    }

    /// Rounds the pairs `pair(j, h)`, of columns 8j + c_column and row c_row of half h of 16 rows × PASS columns, after
    /// adding those of `residual` where it is not null, and writes what of them lies within `rows` and `columns` to `out`;
    /// padding up to the next multiple of eight becomes zero.
    template <class Pair>
    __device__ __forceinline__ static void write(Ring& ring, bf16* out, const bf16* residual, int ld, int rows, int columns,
                                                 Pair pair) {
        constexpr int chunks = PASS / 8;
        bf16* tile = ring.results[warp()];
        const int lane = threadIdx.x % 32;
        // Through shared memory, for accesses of 16 bytes.
        const auto each_chunk = [&](auto f) {
#pragma unroll 4
            for (int i = lane; i < 16 * chunks; i += 32)
                if (i / chunks < rows && i % chunks * 8 < columns)
                    f(*reinterpret_cast<uint4*>(tile + place<chunks>(i / chunks, i % chunks)),
                      size_t(i / chunks) * ld + i % chunks * 8);
        };
        if (residual) {
            each_chunk([&](uint4& chunk, size_t at) { chunk = *reinterpret_cast<const uint4*>(residual + at); });
            __syncwarp();
        }
#pragma unroll
        for (int j = 0; j < chunks; j++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int column = 8 * j + fragments::c_column(lane, 0);
                const int at = place<chunks>(fragments::c_row(lane, 2 * h), j) + column % 8;
                auto& held = *reinterpret_cast<__nv_bfloat162*>(tile + at);
                float2 v = pair(j, h);
                if (residual) {
                    const float2 past = __bfloat1622float2(held);
                    v.x += past.x, v.y += past.y;
                }
                held = __floats2bfloat162_rn(column < columns ? v.x : 0.0f, column + 1 < columns ? v.y : 0.0f);
            }
        __syncwarp();
        each_chunk([&](uint4& chunk, size_t at) { *reinterpret_cast<uint4*>(out + at) = chunk; });
        __syncwarp();
    }
};

} // namespace warpgroups
