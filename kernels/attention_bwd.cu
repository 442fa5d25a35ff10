// Gradients of attention for segments without past, p and ds made again from q, k and the log-sum-exp:
// attention_dq: delta = Σ_k do∘o, ds = p ∘ (do vᵀ − delta), dq = scale · ds k
// attention_dkv: dv = pᵀ do, dk = scale · dsᵀ q, over all queries and heads of the group; after attention_dq, reads its delta
//
// 128 threads, gridDim.y = G; lib/attention.cuh says what pairs and tiles are. attention_dq: a block computes 64 pairs, so that
// each tile of the forward pass's list has `parts` blocks; a warp has 16 pairs, against 64, 32 or 16 keys at a time.
// attention_dkv: a block computes 64 keys (`list` has a tile for each), a warp 16, against 64, 32 or 16 pairs at a time; for
// K > 128 gridDim.z = 2, a block for each half of the columns. The next rows arrive while these are computed.
// _32, 64, 80, 96, 128, 256: for even K up to that; leading dimensions are multiples of 8.
// Sums in f32; p and ds round to bf16 where they meet do, q and k; each gradient rounds once. No sum is shared between
// blocks.
#include "attention.cuh"

using namespace attention;

constexpr int rows = 64;

template <int WIDTH>
struct Queries {
    static constexpr int keys = WIDTH > 128 ? 16 : WIDTH > 96 ? 32 : 64;
    bf16 q[rows][WIDTH + gap];
    bf16 do_[rows][WIDTH + gap];
    bf16 k[2][keys][WIDTH + gap];
    bf16 v[2][keys][WIDTH + gap];
};

/// The first two floats in the gap after each row of q are the pair's log-sum-exp and delta.
template <int WIDTH>
struct Keys {
    static constexpr int pairs = WIDTH > 128 ? 16 : WIDTH > 80 ? 32 : 64;
    bf16 k[rows][WIDTH + gap];
    bf16 v[rows][WIDTH + gap];
    bf16 q[2][pairs][WIDTH + gap];
    bf16 do_[2][pairs][WIDTH + gap];
};

template <int WIDTH>
__device__ __forceinline__ void queries(Queries<WIDTH>& shared, bf16* dq, float* delta, const bf16* do_, const bf16* o,
                                        const float* lse, const bf16* q, const bf16* k, const bf16* v, const uint32_t* list,
                                        int parts, int heads, int group, int dim, int ld_q, int ld_k, float scale) {
    constexpr int KEYS = Queries<WIDTH>::keys, N = KEYS / 8, COLUMNS = WIDTH / 8;
    Tile tile = reinterpret_cast<const Tile*>(list)[blockIdx.x / parts];
    tile.first += blockIdx.x % parts * rows;
    if (tile.first >= tile.pairs) return;
    const uint32_t kv = blockIdx.y, warp = threadIdx.x / 32, row_group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
    const auto place = [&](uint32_t pair) { return int64_t(tile.q + pair / group) * ld_q + (kv * group + pair % group) * dim; };
    const auto sees = [&](uint32_t pair) { return min(pair, tile.pairs - 1) / group + 1; };

    const uint32_t keys = sees(tile.first + rows - 1);
    const auto copy_keys = [&](int stage, uint32_t start) {
        copy_rows<KEYS, WIDTH>({{shared.k[stage], k}, {shared.v[stage], v}}, dim, [&](int r) {
            return start + r < keys ? int64_t(tile.own + start + r) * ld_k + kv * dim : -1;
        });
    };
    copy_rows<rows, WIDTH>({{shared.q, q}, {shared.do_, do_}}, dim, [&](int r) {
        return tile.first + r < tile.pairs ? place(tile.first + r) : -1;
    });
    copy_keys(0, 0);

    const uint32_t first = tile.first + 16 * warp;
    const bool idle = first >= tile.pairs;
    const uint32_t least = sees(first), most = sees(first + 15);
    const float scale2 = scale * log2_e;
    uint32_t seen[2];
    float shift[2], own_delta[2], sums[1][COLUMNS][4] = {};
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint32_t pair = first + 8 * i + row_group;
        const bool there = pair < tile.pairs;
        seen[i] = sees(pair);
        float sum = 0.0f;
        if (there)
            for (int c = 2 * member; c < dim; c += 8) {
                const __nv_bfloat162 a = *reinterpret_cast<const __nv_bfloat162*>(do_ + place(pair) + c);
                const __nv_bfloat162 b = *reinterpret_cast<const __nv_bfloat162*>(o + place(pair) + c);
                sum += __bfloat162float(a.x) * __bfloat162float(b.x) + __bfloat162float(a.y) * __bfloat162float(b.y);
            }
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        own_delta[i] = sum;
        const size_t number = size_t(tile.q + pair / group) * heads + kv * group + pair % group;
        if (there && member == 0) delta[number] = sum;
        shift[i] = there ? lse[number] * log2_e : 0.0f;
    }

    for (uint32_t start = 0, stage = 0; start < keys; start += KEYS, stage ^= 1) {
        ptx::copy_async_wait_all();
        __syncthreads(); // this stage is there, the other is used up
        if (start + KEYS < keys) copy_keys(stage ^ 1, start + KEYS);
        if (idle || start >= most) continue;

        float s[1][N][4] = {}, ds[1][N][4] = {};
        multiply<1, N, WIDTH>(s, &shared.q[16 * warp], shared.k[stage]);
        multiply<1, N, WIDTH>(ds, &shared.do_[16 * warp], shared.v[stage]);
        const bool all = start + KEYS <= least;
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float p = ptx::exp2_approx(__fmaf_rn(s[0][n][i], scale2, -shift[i / 2]));
                const bool sees_it = all || start + 8 * n + 2 * member + i % 2 < seen[i / 2];
                ds[0][n][i] = sees_it ? p * (ds[0][n][i] - own_delta[i / 2]) : 0.0f;
            }
        multiply_add<1, N, COLUMNS, WIDTH>(sums, ds, shared.k[stage], 0);
    }
    if (idle) return;

    // The warp's rows of q are read by itself alone, and no more.
    bf16(*mine)[WIDTH + gap] = &shared.q[16 * warp];
    __syncwarp();
    round_rows<1, COLUMNS, WIDTH>(mine, sums, 0, [&](int, int) { return scale; });
    __syncwarp();
    write_rows<16, WIDTH, WIDTH>(mine, 0, dim, [&](int r) { return first + r < tile.pairs ? dq + place(first + r) : nullptr; });
}

template <int WIDTH>
__device__ __forceinline__ void keys(Keys<WIDTH>& shared, bf16* dk, bf16* dv, const bf16* do_, const float* lse, const float* delta,
                                     const bf16* q, const bf16* k, const bf16* v, const uint32_t* list, int heads, int group,
                                     int dim, int ld_q, int ld_k, float scale) {
    constexpr int PAIRS = Keys<WIDTH>::pairs, N = PAIRS / 8, HALF = WIDTH > 128 ? WIDTH / 2 : WIDTH, COLUMNS = HALF / 8;
    const Tile tile = reinterpret_cast<const Tile*>(list)[blockIdx.x];
    const uint32_t kv = blockIdx.y, warp = threadIdx.x / 32, row_group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
    const uint32_t length = tile.pairs / group, column = blockIdx.z * HALF;
    const auto key_place = [&](uint32_t key) { return int64_t(tile.own + key) * ld_k + kv * dim; };
    const auto copy_pairs = [&](int stage, uint32_t start) {
        copy_rows<PAIRS, WIDTH>({{shared.q[stage], q}, {shared.do_[stage], do_}}, dim, [&](int r) {
            const uint32_t pair = start + r;
            return pair < tile.pairs ? int64_t(tile.q + pair / group) * ld_q + (kv * group + pair % group) * dim : -1;
        });
        if (threadIdx.x < PAIRS) {
            const uint32_t pair = start + threadIdx.x;
            const bool there = pair < tile.pairs;
            const size_t number = there ? size_t(tile.q + pair / group) * heads + kv * group + pair % group : 0;
            ptx::copy_async<4>(&shared.q[stage][threadIdx.x][WIDTH], lse + number, there ? 4 : 0);
            ptx::copy_async<4>(&shared.q[stage][threadIdx.x][WIDTH + 2], delta + number, there ? 4 : 0);
        }
    };
    const uint32_t begin = tile.first * group; // pairs before see none of these keys
    copy_rows<rows, WIDTH>({{shared.k, k}, {shared.v, v}}, dim, [&](int r) {
        return tile.first + r < length ? key_place(tile.first + r) : -1;
    });
    copy_pairs(0, begin);

    const uint32_t first = tile.first + 16 * warp;
    const bool idle = first >= length;
    bf16(*own_k)[WIDTH + gap] = &shared.k[16 * warp];
    bf16(*own_v)[WIDTH + gap] = &shared.v[16 * warp];
    const float scale2 = scale * log2_e;
    float sums_k[1][COLUMNS][4] = {}, sums_v[1][COLUMNS][4] = {};

    for (uint32_t start = begin, stage = 0; start < tile.pairs; start += PAIRS, stage ^= 1) {
        ptx::copy_async_wait_all();
        __syncthreads(); // this stage is there, the other is used up
        if (start + PAIRS < tile.pairs) copy_pairs(stage ^ 1, start + PAIRS);
        if (idle || start + PAIRS <= first * group) continue;

        float p[1][N][4] = {}, ds[1][N][4] = {};
        multiply<1, N, WIDTH>(p, own_k, shared.q[stage]);
        multiply<1, N, WIDTH>(ds, own_v, shared.do_[stage]);
        const bool all = start >= (first + 15) * group && start + PAIRS <= tile.pairs;
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const uint32_t at = 8 * n + 2 * member + j, pair = start + at;
                const float* numbers = reinterpret_cast<const float*>(&shared.q[stage][at][WIDTH]);
                const float shift = numbers[0] * log2_e, delta_ = numbers[1];
                const uint32_t sees = all ? 0xffffffffu : pair < tile.pairs ? pair / group + 1 : 0;
#pragma unroll
                for (int i = j; i < 4; i += 2) {
                    const float exp_ = ptx::exp2_approx(__fmaf_rn(p[0][n][i], scale2, -shift));
                    const bool seen = first + 8 * (i / 2) + row_group < sees;
                    p[0][n][i] = seen ? exp_ : 0.0f;
                    ds[0][n][i] = seen ? exp_ * (ds[0][n][i] - delta_) : 0.0f;
                }
            }
        multiply_add<1, N, COLUMNS, WIDTH>(sums_v, p, shared.do_[stage], column);
        multiply_add<1, N, COLUMNS, WIDTH>(sums_k, ds, shared.q[stage], column);
    }
    if (idle) return;

    // The warp's rows of k and v are read by itself alone, and no more.
    __syncwarp();
    round_rows<1, COLUMNS, WIDTH>(own_k, sums_k, column, [&](int, int) { return scale; });
    round_rows<1, COLUMNS, WIDTH>(own_v, sums_v, column, [&](int, int) { return 1.0f; });
    __syncwarp();
    const auto write = [&](bf16* x, bf16(*from)[WIDTH + gap]) {
        write_rows<16, HALF, WIDTH>(from, column, dim, [&](int r) { return first + r < length ? x + key_place(first + r) : nullptr; });
    };
    write(dk, own_k);
    write(dv, own_v);
}

#define ATTENTION_BWD(width)                                                                                           \
    extern "C" __global__ void __launch_bounds__(threads)                                                              \
        attention_dq_##width(bf16* dq, float* delta, const bf16* do_, const bf16* o, const float* lse, const bf16* q,  \
                             const bf16* k, const bf16* v, const uint32_t* list, int parts, int heads, int group, int dim, \
                             int ld_q, int ld_k, float scale) {                                                        \
        SHARED(Queries<width>, shared);                                                                                \
        queries<width>(shared, dq, delta, do_, o, lse, q, k, v, list, parts, heads, group, dim, ld_q, ld_k, scale);    \
    }                                                                                                                  \
    KERNEL(attention_dq_##width)                                                                                       \
    KERNEL_SHARED(attention_dq_##width, Queries<width>)                                                                \
    extern "C" __global__ void __launch_bounds__(threads)                                                              \
        attention_dkv_##width(bf16* dk, bf16* dv, const bf16* do_, const float* lse, const float* delta, const bf16* q, \
                              const bf16* k, const bf16* v, const uint32_t* list, int heads, int group, int dim, int ld_q, \
                              int ld_k, float scale) {                                                                 \
        SHARED(Keys<width>, shared);                                                                                   \
        keys<width>(shared, dk, dv, do_, lse, delta, q, k, v, list, heads, group, dim, ld_q, ld_k, scale);             \
    }                                                                                                                  \
    KERNEL(attention_dkv_##width)                                                                                      \
    KERNEL_SHARED(attention_dkv_##width, Keys<width>)

ATTENTION_BWD(32)
ATTENTION_BWD(64)
ATTENTION_BWD(80)
ATTENTION_BWD(96)
ATTENTION_BWD(128)
ATTENTION_BWD(256)
