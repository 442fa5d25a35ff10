// attention: o[t, h] = Σ_u p[t, u] v[u, h/(H/G)], p = softmax(scale · q k) over the keys that t sees; lse[t, h] its log-sum-exp
//
// gridDim.x = tiles of the list, gridDim.y = G, 128 threads. A block computes 128 pairs (64 where K > 128) of one segment and one
// key/value head (lib/attention.cuh), a warp 32 (16) of them, against 64 (32) keys at a time: while scores are made, the
// values of the same keys arrive, while values are added up, the next keys. Keys that no pair of a warp sees are left out.
// attention_32, 64, 80, 96, 128, 256: for even K up to that; ld_q, ld_k are multiples of 8.
// Scores, sums and the running maximum in f32; exponentials round to bf16 before they meet v, their sum does not; o rounds
// once. The scale is positive. A row's result depends on its keys alone, not on the tile that it lies in.
#include "attention.cuh"

using namespace attention;

template <int WIDTH>
struct Size {
    static constexpr int m = WIDTH > 128 ? 1 : 2, keys = WIDTH > 96 ? 32 : 64, rows = 64 * m;
};

template <int WIDTH>
struct Shared {
    bf16 q[Size<WIDTH>::rows][WIDTH + gap];
    bf16 k[Size<WIDTH>::keys][WIDTH + gap];
    bf16 v[Size<WIDTH>::keys][WIDTH + gap];
};

template <int WIDTH>
__device__ __forceinline__ void forward(Shared<WIDTH>& shared, bf16* o, float* lse, const bf16* q, const bf16* k, const bf16* v,
                                        const uint32_t* list, int heads, int group, int dim, int ld_q, int ld_k, float scale) {
    constexpr int M = Size<WIDTH>::m, KEYS = Size<WIDTH>::keys, ROWS = Size<WIDTH>::rows, N = KEYS / 8, COLUMNS = WIDTH / 8;
    const Tile tile = reinterpret_cast<const Tile*>(list)[blockIdx.x];
    const uint32_t kv = blockIdx.y, warp = threadIdx.x / 32, row_group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
    const auto place = [&](uint32_t pair) { return int64_t(tile.q + pair / group) * ld_q + (kv * group + pair % group) * dim; };
    const auto sees = [&](uint32_t pair) { return tile.past + min(pair, tile.pairs - 1) / group + 1; };

    const uint32_t keys = sees(tile.first + ROWS - 1);
    const auto copy_keys = [&](bf16(*to)[WIDTH + gap], const bf16* x, uint32_t start) {
        copy_rows<KEYS, WIDTH>({{to, x}}, dim, [&](int r) {
            return start + r < keys ? int64_t(key_row(tile, list, start + r)) * ld_k + kv * dim : -1;
        });
    };
    copy_rows<ROWS, WIDTH>({{shared.q, q}}, dim, [&](int r) {
        return tile.first + r < tile.pairs ? place(tile.first + r) : -1;
    });
    copy_keys(shared.k, k, 0);

    const uint32_t first = tile.first + 16 * M * warp;
    const bool idle = first >= tile.pairs;
    const uint32_t least = sees(first), most = sees(first + 16 * M - 1);
    bf16(*mine)[WIDTH + gap] = &shared.q[16 * M * warp];
    const float scale2 = scale * log2_e;
    uint32_t seen[M][2];
    float max_[M][2], sum[M][2], out[M][COLUMNS][4] = {};
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            seen[m][i] = sees(first + 16 * m + 8 * i + row_group);
            max_[m][i] = -INFINITY;
            sum[m][i] = 0.0f;
        }

    for (uint32_t start = 0; start < keys; start += KEYS) {
        ptx::copy_async_wait_all();
        __syncthreads(); // keys are there, the values before are used up
        copy_keys(shared.v, v, start);

        const bool busy = !idle && start < most;
        float s[M][N][4] = {};
        if (busy) multiply<M, N, WIDTH>(s, mine, shared.k);
        ptx::copy_async_wait_all();
        __syncthreads(); // values are there, the keys are used up
        if (start + KEYS < keys) copy_keys(shared.k, k, start + KEYS);
        if (!busy) continue;

        if (start + KEYS > least) {
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int n = 0; n < N; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        if (start + 8 * n + 2 * member + i % 2 >= seen[m][i / 2]) s[m][n][i] = -INFINITY;
        }
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                // Key 0 is seen by all, so that the maximum is finite from the first block on.
                float most_ = max_[m][i];
#pragma unroll
                for (int n = 0; n < N; n++) most_ = fmaxf(most_, fmaxf(s[m][n][2 * i], s[m][n][2 * i + 1]));
                most_ = fmaxf(most_, __shfl_xor_sync(0xffffffffu, most_, 1));
                most_ = fmaxf(most_, __shfl_xor_sync(0xffffffffu, most_, 2));
                const float shrink = ptx::exp2_approx((max_[m][i] - most_) * scale2), shift = most_ * scale2;
                max_[m][i] = most_;
                sum[m][i] *= shrink;
#pragma unroll
                for (int n = 0; n < COLUMNS; n++) out[m][n][2 * i] *= shrink, out[m][n][2 * i + 1] *= shrink;
#pragma unroll
                for (int n = 0; n < N; n++)
#pragma unroll
                    for (int j = 2 * i; j < 2 * i + 2; j++) {
                        s[m][n][j] = ptx::exp2_approx(__fmaf_rn(s[m][n][j], scale2, -shift));
                        sum[m][i] += s[m][n][j];
                    }
            }
        multiply_add<M, N, COLUMNS, WIDTH>(out, s, shared.v, 0);
    }
    if (idle) return;

#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            sum[m][i] += __shfl_xor_sync(0xffffffffu, sum[m][i], 1);
            sum[m][i] += __shfl_xor_sync(0xffffffffu, sum[m][i], 2);
            const uint32_t pair = first + 16 * m + 8 * i + row_group;
            if (member == 0 && pair < tile.pairs)
                lse[size_t(tile.q + pair / group) * heads + kv * group + pair % group] =
                    max_[m][i] * scale + logf(sum[m][i]);
        }
    // The warp's rows of q are read by itself alone, the last time before the block met for the last values.
    round_rows<M, COLUMNS, WIDTH>(mine, out, 0, [&](int m, int i) { return 1.0f / sum[m][i]; });
    __syncwarp();
    write_rows<16 * M, WIDTH, WIDTH>(mine, 0, dim, [&](int r) { return first + r < tile.pairs ? o + place(first + r) : nullptr; });
}

#define ATTENTION(width)                                                                                               \
    extern "C" __global__ void __launch_bounds__(threads)                                                              \
        attention_##width(bf16* o, float* lse, const bf16* q, const bf16* k, const bf16* v, const uint32_t* list, int heads, \
                          int group, int dim, int ld_q, int ld_k, float scale) {                                       \
        SHARED(Shared<width>, shared);                                                                                 \
        forward<width>(shared, o, lse, q, k, v, list, heads, group, dim, ld_q, ld_k, scale);                           \
    }                                                                                                                  \
    KERNEL(attention_##width)                                                                                          \
    KERNEL_SHARED(attention_##width, Shared<width>)

ATTENTION(32)
ATTENTION(64)
ATTENTION(80)
ATTENTION(96)
ATTENTION(128)
ATTENTION(256)
