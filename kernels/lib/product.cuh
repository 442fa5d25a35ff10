// Tiles of a matrix product on tensor cores: C[m, n] += Σ_k A[m, k] · B[k, n], bf16 operands, f32 sums.
//
// K runs through any number of segments, each with operands of its own: an adapter is one more segment. A block computes
// one tile; its warps lie in a grid over it. Tiles of 32 k go through shared memory in a ring of `stages`, filled by
// asynchronous copies `stages − 1` ahead; registers hold two steps of k16, so that the next one loads while one computes.
// What lies past the edges of a matrix, or past its K, is zero in shared memory and never read from memory.
//
// A line is a row of A or a column of B. An operand lies in memory with k contiguous (`along_k`: rows of x, rows of
// W[O, I] in a forward product) or with its lines contiguous (rows are steps of k). Base addresses are multiples of 16
// bytes, leading dimensions multiples of 8 elements, and a matrix has less than 2^35 elements.
#pragma once
#include "chunks.cuh"
#include "fragments.cuh"
#include "kernel.cuh"
#include "ptx.cuh"
#include "raster.cuh"

namespace product {

/// Steps of k in a tile.
constexpr int DEPTH = 32;

/// One operand's tile in shared memory.
template <int lines_, bool along_k_>
struct Tile {
    static constexpr int lines = lines_;
    static constexpr bool along_k = along_k_;
    static constexpr int rows = along_k ? lines : DEPTH;
    static constexpr int chunks = (along_k ? DEPTH : lines) / 8;
    bf16 data[rows * chunks * 8];
};

/// The copies of one thread into tiles of an operand whose k is contiguous. `panels`: the lines come from as many
/// matrices, in equal parts.
template <class Tile, int threads, int panels = 1, bool along_k = Tile::along_k>
struct Copier {
    static constexpr int count = Tile::rows * Tile::chunks / threads;
    static constexpr int stride = threads / Tile::chunks;
    static_assert(count * threads == Tile::rows * Tile::chunks && stride % 8 == 0 && count % panels == 0);
    const bf16* base[panels];
    uint32_t at[count]; // rows' offsets in chunks
    uint32_t exist;     // which rows do, a bit each
    int left;           // k from this thread's chunk to the segment's end

    __device__ __forceinline__ static int row(int i) { return threadIdx.x / Tile::chunks + stride * i; }
    __device__ __forceinline__ static int chunk() { return threadIdx.x % Tile::chunks; }

    /// Begins a segment of `k` steps; `line(l)` is the row of its panel's matrix that line l is, or negative for zeros.
    template <class Line>
    __device__ __forceinline__ void open(const bf16* const (&matrices)[panels], int ld, int k, Line line) {
#pragma unroll
        for (int p = 0; p < panels; p++) base[p] = matrices[p] + 8 * chunk();
        exist = 0;
#pragma unroll
        for (int i = 0; i < count; i++) {
            const int found = line(row(i));
            at[i] = found < 0 ? 0u : uint32_t(size_t(found) * unsigned(ld) / 8);
            exist |= unsigned(found >= 0) << i;
        }
        left = k - 8 * chunk();
    }

    __device__ __forceinline__ void copy(Tile& tile) {
        const int bytes = min(max(2 * left, 0), 16);
#pragma unroll
        for (int i = 0; i < count; i++)
            ptx::copy_async<16>(tile.data + place<Tile::chunks>(row(i), chunk()),
                                base[i * panels / count] + size_t(at[i]) * 8, exist >> i & 1 ? bytes : 0);
#pragma unroll
        for (int p = 0; p < panels; p++) base[p] += DEPTH;
        left -= DEPTH;
    }
};

/// The same where lines are contiguous.
template <class Tile, int threads>
struct Copier<Tile, threads, 1, false> {
    static constexpr int size = Tile::rows * Tile::chunks;
    static constexpr int count = size > threads ? size / threads : 1; // of a small tile, some threads copy nothing
    static constexpr int stride = threads / Tile::chunks;
    static_assert((size < threads || count * threads == size) && stride % 8 == 0);
    const bf16* base;
    size_t ld;
    int bytes; // of each of this thread's chunks
    int left;  // k from this thread's first row to the segment's end

    __device__ __forceinline__ static int row(int i) { return threadIdx.x / Tile::chunks + stride * i; }
    __device__ __forceinline__ static int chunk() { return threadIdx.x % Tile::chunks; }

    /// Begins a segment of `k` steps at `matrix`'s first row, from its column `first` on, of which it has `lines`.
    __device__ __forceinline__ void open(const bf16* matrix, int ld_, int k, int first, int lines) {
        ld = unsigned(ld_);
        base = matrix + row(0) * ld + first + 8 * chunk();
        bytes = min(max(2 * (lines - first - 8 * chunk()), 0), 16);
        left = k - row(0);
    }

    __device__ __forceinline__ void copy(Tile& tile) {
        if (size >= threads || row(0) < Tile::rows) {
#pragma unroll
            for (int i = 0; i < count; i++)
                ptx::copy_async<16>(tile.data + place<Tile::chunks>(row(i), chunk()), base + stride * i * ld,
                                    left > stride * i ? bytes : 0);
        }
        base += DEPTH * ld;
        left -= DEPTH;
    }
};

/// The four registers of A[16 rows from `line`, 16 k of step `step`].
template <class Tile>
__device__ __forceinline__ void load_a(uint32_t (&r)[4], const Tile& tile, int line, int step) {
    const int lane = threadIdx.x % 32;
    if constexpr (Tile::along_k)
        ptx::ldmatrix_x4(r, tile.data + place<Tile::chunks>(line + lane % 16, 2 * step + lane / 16));
    else
        ptx::ldmatrix_x4_trans(
            r, tile.data + place<Tile::chunks>(16 * step + lane % 8 + lane / 16 * 8, line / 8 + lane / 8 % 2));
}

/// The registers of B[16 k of step `step`, 16 columns from `line`]: 0 and 1 of the first eight columns, then 2 and 3.
template <class Tile>
__device__ __forceinline__ void load_b(uint32_t (&r)[4], const Tile& tile, int line, int step) {
    const int lane = threadIdx.x % 32;
    if constexpr (Tile::along_k)
        ptx::ldmatrix_x4(r, tile.data + place<Tile::chunks>(line + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
    else
        ptx::ldmatrix_x4_trans(r, tile.data + place<Tile::chunks>(16 * step + lane % 16, line / 8 + lane / 16));
}

/// Nothing to do.
struct Nothing {
    template <class... T>
    __device__ __forceinline__ void operator()(T&&...) const {}
};

/// A tile of m × n by warps_m × warps_n warps.
template <int m_, int n_, int warps_m, int warps_n, int stages, bool a_along_k, bool b_along_k, int panels = 1>
struct Product {
    static constexpr int m = m_, n = n_, threads = 32 * warps_m * warps_n;
    static constexpr int warp_m = m / warps_m, warp_n = n / warps_n;
    static constexpr int blocks_m = warp_m / 16, blocks_n = warp_n / 8;
    static_assert(warp_m % 16 == 0 && warp_n % 16 == 0 && stages >= 3);
    using A = Tile<m, a_along_k>;
    using B = Tile<n, b_along_k>;
    using CopyA = Copier<A, threads>;
    using CopyB = Copier<B, threads, panels>;
    struct Ring {
        A a[stages];
        B b[stages];
    };

    /// C as mma leaves it.
    float sums[blocks_m][blocks_n][4];

    __device__ __forceinline__ static int first_row() { return threadIdx.x / 32 % warps_m * warp_m; }
    __device__ __forceinline__ static int first_column() { return threadIdx.x / 32 / warps_m * warp_n; }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < blocks_m; i++)
#pragma unroll
            for (int j = 0; j < blocks_n; j++)
#pragma unroll
                for (int c = 0; c < 4; c++) sums[i][j][c] = 0.0f;
    }

    /// Adds the product of all segments. `open(s, a, b)` begins segment s and returns its K, 0 if there is none.
    /// `landed(tile, a)` is called when this thread's own copies of A's tile number `tile` are in shared memory, before
    /// others read them; `before(tile, a)` before the tile is multiplied, when all may read it. Afterwards no copy is on
    /// its way; the ring is free when the block has met once more.
    template <class Open, class Landed = Nothing, class Before = Nothing>
    __device__ __forceinline__ void add(Ring& ring, Open open, Landed landed = {}, Before before = {}) {
        CopyA copy_a;
        CopyB copy_b;
        int segment = 0, left = 0, issued = 0;
        uint32_t shorts = 0; // of 32 tiles around the current one: which have no second step
        auto issue = [&](int slot) {
            if (left <= 0) left = open(segment++, copy_a, copy_b);
            if (left > 0) {
                copy_a.copy(ring.a[slot]);
                copy_b.copy(ring.b[slot]);
                shorts = (shorts & ~(1u << issued % 32)) | unsigned(left <= DEPTH / 2) << issued % 32;
                left -= DEPTH;
                issued++;
            }
            ptx::copy_async_commit();
        };
        uint32_t a[2][blocks_m][4], b[2][blocks_n / 2][4];
        auto load = [&](int slot, int step) {
#pragma unroll
            for (int i = 0; i < blocks_m; i++) load_a(a[step][i], ring.a[slot], first_row() + 16 * i, step);
#pragma unroll
            for (int j = 0; j < blocks_n / 2; j++) load_b(b[step][j], ring.b[slot], first_column() + 16 * j, step);
        };
        auto multiply = [&](int step) {
#pragma unroll
            for (int i = 0; i < blocks_m; i++)
#pragma unroll
                for (int j = 0; j < blocks_n; j++)
                    ptx::mma_m16n8k16(sums[i][j], a[step][i], b[step][j / 2][j % 2 * 2], b[step][j / 2][j % 2 * 2 + 1]);
        };

#pragma unroll 1
        for (int slot = 0; slot < stages - 1; slot++) issue(slot);
        ptx::copy_async_wait<stages - 2>();
        if (issued > 0) landed(0, ring.a[0]);
        __syncthreads();
        load(0, 0);
        int now = 0, free = stages - 1;
#pragma unroll 1
        for (int tile = 0; tile < issued; tile++) {
            const int next = now + 1 == stages ? 0 : now + 1;
            load(now, 1);
            issue(free);
            before(tile, ring.a[now]);
            multiply(0);
            ptx::copy_async_wait<stages - 2>();
            if (tile + 1 < issued) landed(tile + 1, ring.a[next]);
            __syncthreads();
            load(next, 0);
            if (!(shorts >> tile % 32 & 1)) multiply(1);
            free = now;
            now = next;
        }
    }

    /// Calls `f(row, column, v0, v1)` for each pair of neighbouring columns that this thread holds, v by reference.
    template <class F>
    __device__ __forceinline__ void each(F f) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < blocks_m; i++)
#pragma unroll
            for (int h = 0; h < 2; h++)
#pragma unroll
                for (int j = 0; j < blocks_n; j++)
                    f(first_row() + 16 * i + fragments::c_row(lane, 2 * h),
                      first_column() + 8 * j + fragments::c_column(lane, 0), sums[i][j][2 * h], sums[i][j][2 * h + 1]);
    }
};

/// Writes the tile of m × n that lies rounded in `tile`, in rows of place<n / 8>, to rows row0.. and columns column0.. of
/// `out[rows, width]`; padding up to the next multiple of eight is written too.
template <class P>
__device__ __forceinline__ void store(bf16* out, const bf16* tile, int row0, int column0, int rows, int width, int ld) {
    constexpr int chunks = P::n / 8;
    for (int i = threadIdx.x; i < P::m * chunks; i += P::threads) {
        const int row = row0 + i / chunks, column = column0 + i % chunks * 8;
        if (row >= rows || column >= width) continue;
        *reinterpret_cast<uint4*>(out + size_t(row) * ld + column) =
            *reinterpret_cast<const uint4*>(tile + place<chunks>(i / chunks, i % chunks));
    }
}

} // namespace product
