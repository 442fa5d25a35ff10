// The thin products of adapters, all of which read something wide once.
//
// lora_factors: out[r, c] = bf16(scale · in[r · step_row + c · step_column]), zero from `columns` up to ld: A and s·B as
//   products read them. A thread makes eight neighbours; gridDim.y = jobs, gridDim.x · 256 · 8 ≥ rows · ld of each.
// lora_thin: partial[split, r, c] = Σ_k m∘x[(first + r) mod tokens, k] · factor[c, k] over the k of one split.
//   A block makes 64 rows × 64 columns of one split: gridDim = (⌈rows / 64⌉, ⌈columns / 64⌉, splits).
//   m drops elements of x where `drops`: place r · inner + k.
// lora_thin_sum: t[first + r, c] = bf16(scale · Σ_split partial[split, r, first column + c]) for c < rank, zero up to
//   `width`; gridDim.y = parts, a thread an element.
//
// lora_gradient_16|32|64: partial[span, c, ρ] = Σ_t m∘wide[t, c] · thin[t, ρ] over the tokens t of one span, and, where
//   thin_partial is not null, thin_partial[c's 256 columns, t, ρ] = Σ_c wide[t, c] · factor[ρ, c]: one pass over wide for
//   dB and u, or for dA. A block takes 256 columns, 16, 32 or 64 ρ and one span: gridDim = (⌈columns / 256⌉, ⌈ranks / 16, 32
//   or 64⌉, ⌈tokens / span⌉), span a multiple of 32.
// lora_gradient_sum: grad[c · step_column + ρ · step_rank] += scale · Σ_span partial[span, c, first + ρ]; gridDim.y =
//   parts, a thread an element.
//
// Leading dimensions of bf16 matrices are multiples of 8, that of partial sums is even; padding of inputs is never read.
// f32 sums in the order of k, splits in their order; factors and t round once.
#include "kernel.cuh"
#include "philox.cuh"
#include "product.cuh"

using namespace product;

struct Factor {
    bf16* out;
    const float* in;
    int rows, columns, ld, step_row, step_column;
    float scale;
};
struct Factors {
    Factor job[32];
};

extern "C" __global__ void __launch_bounds__(256) lora_factors(const __grid_constant__ Factors factors) {
    const Factor& job = factors.job[blockIdx.y];
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    const size_t row = i / (job.ld / 8);
    const int column = int(i % (job.ld / 8)) * 8;
    if (row >= size_t(job.rows)) return;
    const float* from = job.in + row * job.step_row;
    unsigned short v[8];
#pragma unroll
    for (int c = 0; c < 8; c++) {
        const bool is = column + c < job.columns;
        v[c] = __bfloat16_as_ushort(__float2bfloat16_rn(is ? job.scale * from[size_t(column + c) * job.step_column] : 0.0f));
    }
    *reinterpret_cast<uint4*>(job.out + row * job.ld + column) =
        make_uint4(v[0] | unsigned(v[1]) << 16, v[2] | unsigned(v[3]) << 16, v[4] | unsigned(v[5]) << 16,
                   v[6] | unsigned(v[7]) << 16);
}
KERNEL(lora_factors)

/// Zeros those of eight elements in shared memory whose bit is not set.
__device__ __forceinline__ void drop(bf16* eight, unsigned bits) {
    uint4& v = *reinterpret_cast<uint4*>(eight);
    auto mask = [=](int pair) { return (bits >> 2 * pair & 1) * 0xffffu | (bits >> 2 * pair >> 1 & 1) * 0xffff0000u; };
    v.x &= mask(0), v.y &= mask(1), v.z &= mask(2), v.w &= mask(3);
}

using Thin = Product<64, 64, 4, 1, 6, true, true>;

struct ThinShared {
    Thin::Ring ring;
};

extern "C" __global__ void __launch_bounds__(128)
    lora_thin(float* partial, const bf16* x, const bf16* factor, int first, int rows, int tokens, int columns,
              int ld_partial, int inner, int ld_x, int ld_factor, int split, int drops, Dropout dropout) {
    SHARED(ThinShared, shared);
    const int row0 = blockIdx.x * Thin::m, column0 = blockIdx.y * Thin::n;
    const int k0 = blockIdx.z * split, depth = min(inner - k0, split);
    auto row_of_x = [=](int line) { return row0 + line < rows ? (first + row0 + line) % tokens : -1; };

    Thin product;
    product.clear();
    product.add(
        shared.ring,
        [&](int segment, Thin::CopyA& a, Thin::CopyB& b) {
            if (segment > 0) return 0;
            a.open({x + k0}, ld_x, depth, row_of_x);
            b.open({factor + k0}, ld_factor, depth, [=](int line) { return column0 + line < columns ? column0 + line : -1; });
            return depth;
        },
        [&](int tile, Thin::A& a) {
            if (!drops) return;
#pragma unroll
            for (int i = 0; i < Thin::CopyA::count; i++) {
                const int line = Thin::CopyA::row(i), chunk = Thin::CopyA::chunk(), row = row_of_x(line);
                const int k = k0 + tile * DEPTH + 8 * chunk;
                if (row < 0) continue;
                drop(a.data + place<Thin::A::chunks>(line, chunk), kept<8>(dropout, uint64_t(row) * unsigned(inner) + unsigned(k)));
            }
        });
    product.each([&](int row, int column, float v0, float v1) {
        if (row0 + row >= rows || column0 + column >= columns) return;
        float* to = partial + (size_t(blockIdx.z) * rows + row0 + row) * ld_partial + column0 + column;
        *reinterpret_cast<float2*>(to) = make_float2(v0, v1);
    });
}
KERNEL(lora_thin)
KERNEL_SHARED(lora_thin, ThinShared)

/// Columns `first..first + rank` of the partial sums are columns 0..rank of `t`.
struct Part {
    bf16* t;
    int ld, first, rank, width;
};
struct Parts {
    Part part[4];
};

extern "C" __global__ void __launch_bounds__(256)
    lora_thin_sum(const float* partial, int first, int rows, int ld_partial, int splits, float scale,
                  const __grid_constant__ Parts parts) {
    const Part& part = parts.part[blockIdx.y];
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x, row = i / part.width;
    const int column = int(i % part.width);
    if (row >= size_t(rows)) return;
    float sum = 0.0f;
    if (column < part.rank)
        for (int split = 0; split < splits; split++)
            sum += partial[(size_t(split) * rows + row) * ld_partial + part.first + column];
    part.t[(first + row) * part.ld + column] = __float2bfloat16_rn(scale * sum);
}
KERNEL(lora_thin_sum)

template <int n>
struct Gradient {
    using P = Product<256, n, 8, 1, 3, false, false>; // four stages of 64 ρ would be too much for 8.6
    struct Shared {
        typename P::Ring ring;
        bf16 factor[n * P::m];
    };
};

template <int n>
__device__ __forceinline__ void
lora_gradient(typename Gradient<n>::Shared& shared, float* partial, float* thin_partial, const bf16* wide, const bf16* thin,
              const bf16* factor, int tokens, int columns, int ranks, int ld_partial, int ld_wide, int ld_thin, int ld_factor,
              int span, int drops, const Dropout& dropout) {
    using P = typename Gradient<n>::P;
    constexpr int chunks = P::m / 8;
    const int column0 = blockIdx.x * P::m, rank0 = blockIdx.y * n, token0 = blockIdx.z * span;
    const int depth = min(tokens - token0, span);
    if (thin_partial) {
        // With the first tile's copies, so the barrier that makes that visible makes this visible.
        for (int i = threadIdx.x; i < n * chunks; i += P::threads) {
            const int rank = i / chunks, column = column0 + i % chunks * 8;
            const int bytes = rank0 + rank < ranks ? min(max(2 * (columns - column), 0), 16) : 0;
            ptx::copy_async<16>(shared.factor + place<chunks>(rank, i % chunks),
                                factor + (bytes ? size_t(rank0 + rank) * ld_factor + column : 0), bytes);
        }
    }
    P product;
    product.clear();
    product.add(
        shared.ring,
        [&](int segment, typename P::CopyA& a, typename P::CopyB& b) {
            if (segment > 0) return 0;
            a.open(wide + size_t(token0) * ld_wide, ld_wide, depth, column0, columns);
            b.open(thin + size_t(token0) * ld_thin, ld_thin, depth, rank0, ranks);
            return depth;
        },
        [&](int tile, typename P::A& a) {
            if (!drops) return;
#pragma unroll
            for (int i = 0; i < P::CopyA::count; i++) {
                const int row = P::CopyA::row(i), chunk = P::CopyA::chunk();
                const int token = token0 + tile * DEPTH + row, column = column0 + 8 * chunk;
                if (token >= tokens || column >= columns) continue;
                drop(a.data + place<chunks>(row, chunk), kept<8>(dropout, uint64_t(token) * unsigned(columns) + unsigned(column)));
            }
        },
        [&](int tile, const typename P::A& a) {
            // Warps 2i and 2i + 1 make columns 16i..16i + 16 of thin, 16 of the tile's 32 tokens each.
            const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, line = warp % 2 * 16, rank = warp / 2 * 16;
            if (!thin_partial || rank >= n || rank0 + rank >= ranks) return;
            float sums[2][4] = {};
#pragma unroll 4
            for (int k = 0; k < P::m; k += 16) {
                uint32_t left[4], right[4];
                ptx::ldmatrix_x4(left, a.data + place<chunks>(line + lane % 16, k / 8 + lane / 16));
                ptx::ldmatrix_x4(right, shared.factor + place<chunks>(rank + lane % 8 + lane / 16 * 8, k / 8 + lane / 8 % 2));
                ptx::mma_m16n8k16(sums[0], left, right[0], right[1]);
                ptx::mma_m16n8k16(sums[1], left, right[2], right[3]);
            }
#pragma unroll
            for (int j = 0; j < 2; j++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const int token = token0 + tile * DEPTH + line + fragments::c_row(lane, 2 * h);
                    const int r = rank0 + rank + 8 * j + fragments::c_column(lane, 0);
                    if (token >= tokens || r >= ranks) continue;
                    float* to = thin_partial + (size_t(blockIdx.x) * tokens + token) * ld_partial + r;
                    *reinterpret_cast<float2*>(to) = make_float2(sums[j][2 * h], sums[j][2 * h + 1]);
                }
        });
    product.each([&](int column, int rank, float v0, float v1) {
        if (column0 + column >= columns || rank0 + rank >= ranks) return;
        float* to = partial + (size_t(blockIdx.z) * columns + column0 + column) * ld_partial + rank0 + rank;
        *reinterpret_cast<float2*>(to) = make_float2(v0, v1);
    });
}

#define LORA_GRADIENT(n)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(256)                                                                      \
        lora_gradient_##n(float* partial, float* thin_partial, const bf16* wide, const bf16* thin, const bf16* factor,     \
                          int tokens, int columns, int ranks, int ld_partial, int ld_wide, int ld_thin, int ld_factor,     \
                          int span, int drops, Dropout dropout) {                                                          \
        SHARED(Gradient<n>::Shared, shared);                                                                               \
        lora_gradient<n>(shared, partial, thin_partial, wide, thin, factor, tokens, columns, ranks, ld_partial, ld_wide,   \
                         ld_thin, ld_factor, span, drops, dropout);                                                        \
    }                                                                                                                      \
    KERNEL(lora_gradient_##n)                                                                                              \
    KERNEL_SHARED(lora_gradient_##n, Gradient<n>::Shared)

LORA_GRADIENT(16)
LORA_GRADIENT(32)
LORA_GRADIENT(64)

/// Columns `first..first + rank` of the partial sums belong to `grad`.
struct GradientPart {
    float* grad;
    int first, rank, step_column, step_rank;
    float scale;
};
struct GradientParts {
    GradientPart part[4];
};

extern "C" __global__ void __launch_bounds__(256)
    lora_gradient_sum(const float* partial, int columns, int ld_partial, int spans,
                      const __grid_constant__ GradientParts parts) {
    const GradientPart& part = parts.part[blockIdx.y];
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x, column = i / part.rank;
    const int rank = int(i % part.rank);
    if (column >= size_t(columns)) return;
    float sum = 0.0f;
    for (int span = 0; span < spans; span++)
        sum += partial[(size_t(span) * columns + column) * ld_partial + part.first + rank];
    part.grad[column * part.step_column + size_t(rank) * part.step_rank] += part.scale * sum;
}
KERNEL(lora_gradient_sum)
