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
                const unsigned bits = kept<8>(dropout, uint64_t(row) * unsigned(inner) + unsigned(k));
                uint4& v = *reinterpret_cast<uint4*>(a.data + place<Thin::A::chunks>(line, chunk));
                auto mask = [&](int pair) { return (bits >> 2 * pair & 1) * 0xffffu | (bits >> 2 * pair >> 1 & 1) * 0xffff0000u; };
                v.x &= mask(0), v.y &= mask(1), v.z &= mask(2), v.w &= mask(3);
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
