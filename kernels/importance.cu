// importance_first|second: per sample j, acc_j[o, i] = Σ_t dy[t, o] x[t, i] over its tokens; g = Σ_j acc_j,
//   F = (1 / counted) Σ_j (weight_j acc_j)²; for each score (AbsFirst 0, First 1, Second 2, AbsMix 3: src/ops/importance.rs)
//   its sums over the tile's columns, row_parts[tile across, score, o], and rows, col_parts[tile down, score, i].
// importance_sum: out[k] = Σ_p parts[p, k], in the order of p
//
// A block makes one tile of W, 128 × 128 without F (importance_first) and 128 × 64 with it; gridDim.x = tiles. g and F are
// f32 sums; no gradient is ever stored. Scores and their sums are f64. Samples are {first token, tokens, weight as bits},
// none of them empty; each is a segment of K (lib/product.cuh).
// Leading dimensions are multiples of 8; padding is never read.
#include "kernel.cuh"
#include "product.cuh"

using namespace product;

struct Scores {
    int count;
    int kind[7];
};

template <class P, int warps_m, int warps_n>
union Shared {
    typename P::Ring ring;
    struct {
        bf16 w[P::m * P::n];
        double rows[warps_n][P::m];
        double columns[warps_m][P::n];
    } sums;
};

__device__ __forceinline__ double score_of(int kind, double w, double g, double f) {
    const double first = w * g, second = w * w * f;
    return kind == 0 ? fabs(first) : kind == 1 ? first : kind == 2 ? second : fabs(first - 0.5 * second);
}

/// The sum over the lanes whose numbers differ in the bits of `flips`.
template <int least, int most>
__device__ __forceinline__ double lanes_sum(double value) {
#pragma unroll
    for (int flip = least; flip <= most; flip *= 2) value += __shfl_xor_sync(0xffffffffu, value, flip);
    return value;
}

template <class P, int warps_m, int warps_n, bool second>
__device__ __forceinline__ void
importance(Shared<P, warps_m, warps_n>& shared, double* row_parts, double* col_parts, const bf16* dy, const bf16* x,
           const bf16* w, const uint32_t* samples, int count, int counted, int out, int inner, int ld_dy, int ld_x, int ld_w,
           const Scores& scores) {
    const Place at = raster(blockIdx.x, (out + P::m - 1) / P::m, (inner + P::n - 1) / P::n);
    const int row0 = at.down * P::m, column0 = at.across * P::n;

    P product;
    product.clear();
    // F over all samples but the last, and g, which without F is the product itself.
    float g[second ? P::blocks_m : 1][P::blocks_n][4] = {}, q[second ? P::blocks_m : 1][P::blocks_n][4] = {};
    int sample = 0, end = second && count > 0 ? (int(samples[1]) + DEPTH - 1) / DEPTH : -1;
    auto fold = [&]() {
        const float weight = __uint_as_float(samples[3 * sample + 2]);
#pragma unroll
        for (int i = 0; i < (second ? P::blocks_m : 0); i++)
#pragma unroll
            for (int j = 0; j < P::blocks_n; j++)
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    const float acc = product.sums[i][j][c], own = weight * acc;
                    g[i][j][c] += acc;
                    q[i][j][c] += own * own;
                    product.sums[i][j][c] = 0.0f;
                }
    };
    product.add(
        shared.ring,
        [&](int segment, typename P::CopyA& a, typename P::CopyB& b) {
            if (segment >= count) return 0;
            const size_t token = samples[3 * segment];
            const int depth = int(samples[3 * segment + 1]);
            a.open(dy + token * ld_dy, ld_dy, depth, row0, out);
            b.open(x + token * ld_x, ld_x, depth, column0, inner);
            return depth;
        },
        Nothing(),
        [&](int tile, const typename P::A&) {
            if (!second || tile != end) return;
            fold();
            sample++;
            end += (int(samples[3 * sample + 1]) + DEPTH - 1) / DEPTH;
        });
    if (second && count > 0) fold();
    __syncthreads(); // the ring is free

    // W's tile, zero past its edges.
    constexpr int chunks = P::n / 8;
    for (int i = threadIdx.x; i < P::m * chunks; i += P::threads) {
        const int row = row0 + i / chunks, column = column0 + i % chunks * 8;
        const int bytes = row < out ? min(max(2 * (inner - column), 0), 16) : 0;
        ptx::copy_async<16>(shared.sums.w + place<chunks>(i / chunks, i % chunks),
                            w + (bytes ? size_t(row) * ld_w + column : 0), bytes);
    }
    ptx::copy_async_wait_all();
    __syncthreads();

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first_row = P::first_row(), first_column = P::first_column();
#pragma unroll 1
    for (int s = 0; s < scores.count; s++) {
        const int kind = scores.kind[s];
        double columns[P::blocks_n][2] = {};
#pragma unroll
        for (int i = 0; i < P::blocks_m; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int row = first_row + 16 * i + fragments::c_row(lane, 2 * h);
                double sum = 0;
#pragma unroll
                for (int j = 0; j < P::blocks_n; j++) {
                    const int column = first_column + 8 * j;
                    const auto pair = *reinterpret_cast<const __nv_bfloat162*>(
                        shared.sums.w + place<chunks>(row, column / 8) + fragments::c_column(lane, 0));
                    const float2 weights = __bfloat1622float2(pair);
#pragma unroll
                    for (int c = 0; c < 2; c++) {
                        const double gradient = second ? g[second ? i : 0][j][2 * h + c] : product.sums[i][j][2 * h + c];
                        const double f = second ? double(q[second ? i : 0][j][2 * h + c]) / counted : 0.0;
                        const double value = score_of(kind, c == 0 ? weights.x : weights.y, gradient, f);
                        sum += value;
                        columns[j][c] += value;
                    }
                }
                sum = lanes_sum<1, 2>(sum);
                if (lane % 4 == 0) shared.sums.rows[warp / warps_m][row] = sum;
            }
#pragma unroll
        for (int j = 0; j < P::blocks_n; j++)
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const double sum = lanes_sum<4, 16>(columns[j][c]);
                if (lane < 4) shared.sums.columns[warp % warps_m][first_column + 8 * j + fragments::c_column(lane, c)] = sum;
            }
        __syncthreads();
        for (int r = threadIdx.x; r < P::m; r += P::threads) {
            double sum = 0;
            for (int n = 0; n < warps_n; n++) sum += shared.sums.rows[n][r];
            if (row0 + r < out) row_parts[(size_t(at.across) * scores.count + s) * out + row0 + r] = sum;
        }
        for (int c = threadIdx.x; c < P::n; c += P::threads) {
            double sum = 0;
            for (int m = 0; m < warps_m; m++) sum += shared.sums.columns[m][c];
            if (column0 + c < inner) col_parts[(size_t(at.down) * scores.count + s) * inner + column0 + c] = sum;
        }
        __syncthreads();
    }
}

using First = Product<128, 128, 2, 4, 4, false, false>;
using Second = Product<128, 64, 4, 2, 4, false, false>;
using FirstShared = Shared<First, 2, 4>;
using SecondShared = Shared<Second, 4, 2>;

extern "C" __global__ void __launch_bounds__(256)
    importance_first(double* row_parts, double* col_parts, const bf16* dy, const bf16* x, const bf16* w,
                     const uint32_t* samples, int count, int counted, int out, int inner, int ld_dy, int ld_x, int ld_w,
                     const __grid_constant__ Scores scores) {
    SHARED(FirstShared, shared);
    importance<First, 2, 4, false>(shared, row_parts, col_parts, dy, x, w, samples, count, counted, out, inner, ld_dy, ld_x,
                                   ld_w, scores);
}
KERNEL(importance_first)
KERNEL_SHARED(importance_first, FirstShared)

extern "C" __global__ void __launch_bounds__(256)
    importance_second(double* row_parts, double* col_parts, const bf16* dy, const bf16* x, const bf16* w,
                      const uint32_t* samples, int count, int counted, int out, int inner, int ld_dy, int ld_x, int ld_w,
                      const __grid_constant__ Scores scores) {
    SHARED(SecondShared, shared);
    importance<Second, 4, 2, true>(shared, row_parts, col_parts, dy, x, w, samples, count, counted, out, inner, ld_dy, ld_x,
                                   ld_w, scores);
}
KERNEL(importance_second)
KERNEL_SHARED(importance_second, SecondShared)

extern "C" __global__ void __launch_bounds__(256) importance_sum(double* out, const double* parts, int count, size_t length) {
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= length) return;
    double sum = 0;
    for (int p = 0; p < count; p++) sum += parts[p * length + i];
    out[i] = sum;
}
KERNEL(importance_sum)
