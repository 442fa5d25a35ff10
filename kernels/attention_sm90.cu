// attention: as in attention.cu, for K of 64 and 128.
//
// gridDim.x = tiles of the list, gridDim.y = G, 384 threads. A block computes 128 pairs of one segment and one key/value
// head (lib/attention.cuh): a warp copies 128 keys at a time to two places for keys and two for values, two warpgroups
// take 64 pairs each. Keys are copied eight rows at a time where they lie together, else by the row; rows past the tile's
// last key become zero. Maps of k and v are of boxes of 8 × 64 and of 1 × 64.
// Rounds where attention.cu does. A row's result depends on its keys alone, not on the tile that it lies in.
#define SHARED_MOST 232448
#include "attention.cuh"
#include "fragments.cuh"
#include "ptx_sm90.cuh"

using namespace attention;

constexpr int KEYS = 128, ROWS = 128, STAGES = 2, BOX = 8;

template <int WIDTH>
struct Shared {
    bf16 k[STAGES][KEYS * WIDTH]; // 64 columns of all rows, then the next 64
    bf16 v[STAGES][KEYS * WIDTH];
    bf16 o[ROWS / 16][16][WIDTH + gap];
    uint64_t k_full[STAGES], v_full[STAGES], k_empty[STAGES], v_empty[STAGES];
};

/// The number of a block of keys as a place, and the parity of the phase in which it is full.
struct Stage {
    uint32_t slot, parity;
    __device__ __forceinline__ explicit Stage(uint32_t block) : slot(block % STAGES), parity(block / STAGES % 2) {}
};

/// The sums of a warpgroup as wgmma takes them.
template <int N>
__device__ __forceinline__ float (&flat(float (&sums)[1][N][4]))[4 * N] {
    return reinterpret_cast<float(&)[4 * N]>(sums);
}

/// Copies keys start.. of columns column.., by one warp. `rows(u)` is the row of key u, -1 for one that is not there.
template <int WIDTH, class Rows>
__device__ __forceinline__ void copy_keys(bf16* to, const ptx::TensorMap& boxes, const ptx::TensorMap& lines, uint64_t* full,
                                          int column, uint32_t start, Rows rows) {
    const int first = threadIdx.x % 32 * BOX;
    if (first >= KEYS) return;
    int row[BOX];
    bool together = true;
#pragma unroll
    for (int i = 0; i < BOX; i++) {
        row[i] = rows(start + first + i);
        together = together && row[i] == row[0] + i;
    }
#pragma unroll 1
    for (int part = 0; part < WIDTH / 64; part++) {
        bf16* at = to + part * KEYS * 64 + first * 64;
        if (together && row[0] >= 0) {
            ptx::copy_tile(at, boxes, full, column + 64 * part, row[0]);
        } else {
#pragma unroll
            for (int i = 0; i < BOX; i++) ptx::copy_tile(at + 64 * i, lines, full, column + 64 * part, row[i]);
        }
    }
}

template <int WIDTH>
__device__ __forceinline__ void forward(Shared<WIDTH>& shared, bf16* o, float* lse, const bf16* q,
                                        const ptx::TensorMap& k_boxes, const ptx::TensorMap& k_lines,
                                        const ptx::TensorMap& v_boxes, const ptx::TensorMap& v_lines, const uint32_t* list,
                                        int heads, int group, int ld_q, float scale) {
    constexpr int N = KEYS / 8, COLUMNS = WIDTH / 8;
    const Tile tile = reinterpret_cast<const Tile*>(list)[blockIdx.x];
    const uint32_t kv = blockIdx.y, lane = threadIdx.x % 32;
    const auto place = [&](uint32_t pair) {
        return int64_t(tile.q + pair / group) * ld_q + (kv * group + pair % group) * WIDTH;
    };
    const auto sees = [&](uint32_t pair) { return tile.past + min(pair, tile.pairs - 1) / group + 1; };
    const uint32_t keys = sees(tile.first + ROWS - 1), blocks = (keys + KEYS - 1) / KEYS;

    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            ptx::mbarrier_init(&shared.k_full[i], 1);
            ptx::mbarrier_init(&shared.v_full[i], 1);
            ptx::mbarrier_init(&shared.k_empty[i], ROWS / 16);
            ptx::mbarrier_init(&shared.v_empty[i], ROWS / 16);
        }
        ptx::fence_proxy_async();
    }
    __syncthreads();

    if (threadIdx.x < 128) {
        ptx::registers_release<40>();
        if (threadIdx.x >= 32) return;
        const auto rows = [&](uint32_t u) { return u < keys ? int(key_row(tile, list, u)) : -1; };
        for (uint32_t block = 0; block < blocks; block++) {
            const Stage stage(block);
            const uint32_t start = KEYS * block;
            uint64_t *k_full = &shared.k_full[stage.slot], *v_full = &shared.v_full[stage.slot];
            ptx::mbarrier_wait(&shared.k_empty[stage.slot], stage.parity ^ 1);
            if (lane == 0) ptx::mbarrier_arrive_expect(k_full, sizeof shared.k[0]);
            copy_keys<WIDTH>(shared.k[stage.slot], k_boxes, k_lines, k_full, kv * WIDTH, start, rows);
            ptx::mbarrier_wait(&shared.v_empty[stage.slot], stage.parity ^ 1);
            if (lane == 0) ptx::mbarrier_arrive_expect(v_full, sizeof shared.v[0]);
            copy_keys<WIDTH>(shared.v[stage.slot], v_boxes, v_lines, v_full, kv * WIDTH, start, rows);
        }
        return;
    }
    ptx::registers_claim<232>();
    const uint32_t warp = threadIdx.x / 32 - 4, first = tile.first + 16 * warp;
    uint32_t queries[WIDTH / 16][4];
#pragma unroll
    for (int step = 0; step < WIDTH / 16; step++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t pair = first + fragments::a_row(lane, i);
            const int column = 16 * step + fragments::a_k(lane, i, 0);
            queries[step][i] = pair < tile.pairs ? *reinterpret_cast<const uint32_t*>(q + place(pair) + column) : 0;
        }
    const float scale2 = scale * log2_e;
    uint32_t seen[2];
    float max_[2], sum[2], out[1][COLUMNS][4] = {};
#pragma unroll
    for (int i = 0; i < 2; i++) {
        seen[i] = sees(first + 8 * i + fragments::group(lane));
        max_[i] = -INFINITY;
        sum[i] = 0.0f;
    }

#pragma unroll 1
    for (uint32_t block = 0; block < blocks; block++) {
        const Stage stage(block);
        const uint32_t start = KEYS * block;
        float s[1][N][4] = {};
        ptx::mbarrier_wait(&shared.k_full[stage.slot], stage.parity);
        const uint64_t right = ptx::swizzled(shared.k[stage.slot]);
        ptx::wgmma_fence();
#pragma unroll
        for (int step = 0; step < WIDTH / 16; step++)
            ptx::wgmma<KEYS, false>(flat(s), queries[step], right + (step / 4 * KEYS * 128 + step % 4 * 32) / 16);
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>();
        // Each warp for itself: wgmma does not make the four wait for each other.
        if (lane == 0) ptx::mbarrier_arrive(&shared.k_empty[stage.slot]);

#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (start + 8 * n + fragments::c_column(lane, i) >= seen[i / 2]) s[0][n][i] = -INFINITY;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            // Key 0 is seen by all, so that the maximum is finite from the first block on.
            float most = max_[i];
#pragma unroll
            for (int n = 0; n < N; n++) most = fmaxf(most, fmaxf(s[0][n][2 * i], s[0][n][2 * i + 1]));
            most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
            most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
            const float shrink = ptx::exp2_approx((max_[i] - most) * scale2), shift = most * scale2;
            max_[i] = most;
            sum[i] *= shrink;
#pragma unroll
            for (int n = 0; n < COLUMNS; n++) out[0][n][2 * i] *= shrink, out[0][n][2 * i + 1] *= shrink;
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int j = 2 * i; j < 2 * i + 2; j++) {
                    s[0][n][j] = ptx::exp2_approx(__fmaf_rn(s[0][n][j], scale2, -shift));
                    sum[i] += s[0][n][j];
                }
        }
        uint32_t weights[KEYS / 16][4];
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) weights[n / 2][n % 2 * 2 + i] = pack(s[0][n][2 * i], s[0][n][2 * i + 1]);

        ptx::mbarrier_wait(&shared.v_full[stage.slot], stage.parity);
        const uint64_t values = ptx::swizzled(shared.v[stage.slot], KEYS * 128);
        ptx::wgmma_fence();
#pragma unroll
        for (int step = 0; step < KEYS / 16; step++)
            ptx::wgmma<WIDTH, true>(flat(out), weights[step], values + step * 16 * 128 / 16);
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>();
        if (lane == 0) ptx::mbarrier_arrive(&shared.v_empty[stage.slot]);
    }

#pragma unroll
    for (int i = 0; i < 2; i++) {
        sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 1);
        sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 2);
        const uint32_t pair = first + 8 * i + fragments::group(lane);
        if (fragments::member(lane) == 0 && pair < tile.pairs)
            lse[size_t(tile.q + pair / group) * heads + kv * group + pair % group] = max_[i] * scale + logf(sum[i]);
    }
    round_rows<1, COLUMNS, WIDTH>(shared.o[warp], out, 0, [&](int, int i) { return 1.0f / sum[i]; });
    __syncwarp();
    write_rows<16, WIDTH, WIDTH>(shared.o[warp], 0, WIDTH,
                                 [&](int r) { return first + r < tile.pairs ? o + place(first + r) : nullptr; });
}

#define ATTENTION(width)                                                                                               \
    extern "C" __global__ void __launch_bounds__(384, 1)                                                               \
        attention_##width##_sm90(bf16* o, float* lse, const bf16* q, const __grid_constant__ ptx::TensorMap k_boxes,   \
                                 const __grid_constant__ ptx::TensorMap k_lines,                                       \
                                 const __grid_constant__ ptx::TensorMap v_boxes,                                       \
                                 const __grid_constant__ ptx::TensorMap v_lines, const uint32_t* list, int heads,      \
                                 int group, int ld_q, float scale) {                                                   \
        SHARED(Shared<width>, shared);                                                                                 \
        forward<width>(shared, o, lse, q, k_boxes, k_lines, v_boxes, v_lines, list, heads, group, ld_q, scale);        \
    }                                                                                                                  \
    KERNEL(attention_##width##_sm90)                                                                                   \
    KERNEL_SHARED(attention_##width##_sm90, Shared<width>)

ATTENTION(64)
ATTENTION(128)
