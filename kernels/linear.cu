// linear: y_j[r, o] = Σ_i x[r mod T, i] W_j[o, i] + Σ_ρ t_j[r, ρ] sB_j[o, ρ] (+ bias_j[o]) (+ residual[r, o])
// linear_swiglu: the same of two outputs, gate and up, and h = silu(gate) ∘ up of the rounded gate and up
//
// One product over K extended by the rank: a group of rows with an adapter is a segment of K of its own (lib/product.cuh),
// in which rows of other groups count as zero. Blocks are one-dimensional and each makes one tile of one output, of
// linear_swiglu the same columns of both, half a tile each; every output has ceil(width / tile's columns) tiles across,
// all outputs side by side have `across`, and gridDim.x = across · ceil(rows / tile's rows).
// All leading dimensions are multiples of 8; padding of inputs is never read, that of y and h becomes zero up to the next
// multiple of 8. f32 sums, y rounds once, h from the rounded gate and up in f32, once.
#include "kernel.cuh"
#include "product.cuh"
#include "sigmoid.cuh"

using namespace product;

/// Rows `start..end` of an output have the adapter whose s·B is `factor[O, ⌈rank⌉₈]`.
struct Rows {
    const bf16* factor;
    int start, end, rank;
};
struct Output {
    bf16* y;
    const bf16* w;
    const bf16* t;
    const float* bias; // null for none
    int width, ld, ld_t;
    int groups_end; // of its groups in the table; they begin where those of the output before end
    int tiles_end;  // of its tiles across
};
struct Task {
    const bf16* x;
    const bf16* residual; // of the one output, null for none
    bf16* h;              // linear_swiglu only
    int rows, tokens, inner, ld_x, ld_w, outputs, across;
    Output output[4];
    Rows group[144];
};
static_assert(sizeof(Task) <= 4096, "what a kernel takes by value");

template <class P>
union Shared {
    typename P::Ring ring;
    bf16 tile[P::m * P::n];
};

template <class P, bool pair>
__device__ __forceinline__ void linear_tile(const Task& task, Shared<P>& shared) {
    constexpr int panels = pair ? 2 : 1, width = P::n / panels, chunks = P::n / 8;
    const Place at = raster(blockIdx.x, (task.rows + P::m - 1) / P::m, task.across);
    int j = 0;
    if constexpr (!pair)
        while (at.across >= task.output[j].tiles_end) j++;
    const Output& output = task.output[j];
    const int row0 = at.down * P::m;
    const int column0 = (at.across - (j > 0 ? task.output[j - 1].tiles_end : 0)) * width;
    const int last_group = task.output[pair ? 1 : j].groups_end;
    int group = j > 0 ? task.output[j - 1].groups_end : 0;

    P product;
    product.clear();
    product.add(shared.ring, [&](int segment, typename P::CopyA& a, typename P::CopyB& b) {
        // Columns of W or sB of the panels in `from..to`.
        auto columns = [&](int from, int to) {
            return [=, &output](int line) {
                const int column = column0 + line % width, panel = line / width;
                return column < output.width && panel >= from && panel < to ? column : -1;
            };
        };
        if (segment == 0) {
            a.open({task.x}, task.ld_x, task.inner, [&](int line) {
                return row0 + line < task.rows ? (row0 + line) % task.tokens : -1;
            });
            if constexpr (pair) b.open({output.w, task.output[1].w}, task.ld_w, task.inner, columns(0, 2));
            else b.open({output.w}, task.ld_w, task.inner, columns(0, 1));
            return task.inner;
        }
        for (; group < last_group; group++) {
            const Rows& rows = task.group[group];
            if (rows.start >= row0 + P::m || rows.end <= row0) continue;
            const int panel = pair && group >= output.groups_end;
            const Output& of = task.output[j + panel];
            a.open({of.t}, of.ld_t, rows.rank, [&](int line) {
                const int row = row0 + line;
                return row >= rows.start && row < rows.end ? row : -1;
            });
            const int ld = (rows.rank + 7) / 8 * 8;
            if constexpr (pair) b.open({rows.factor, rows.factor}, ld, rows.rank, columns(panel, panel + 1));
            else b.open({rows.factor}, ld, rows.rank, columns(0, 1));
            group++;
            return rows.rank;
        }
        return 0;
    });
    __syncthreads(); // the ring is free

    // Through shared memory, for accesses of 16 bytes.
    if (task.residual) {
        for (int i = threadIdx.x; i < P::m * chunks; i += P::threads) {
            const int row = row0 + i / chunks, column = column0 + i % chunks * 8;
            const int bytes = row < task.rows ? min(max(2 * (output.width - column), 0), 16) : 0;
            ptx::copy_async<16>(shared.tile + place<chunks>(i / chunks, i % chunks),
                                task.residual + (bytes ? size_t(row) * output.ld + column : 0), bytes);
        }
        ptx::copy_async_wait_all();
        __syncthreads();
    }
    product.each([&](int row, int column, float v0, float v1) {
        const Output& of = task.output[j + (pair && column >= width)];
        const int c = column0 + column % width;
        if (of.bias) {
            v0 += c < of.width ? of.bias[c] : 0.0f;
            v1 += c + 1 < of.width ? of.bias[c + 1] : 0.0f;
        }
        auto& held = *reinterpret_cast<__nv_bfloat162*>(shared.tile + place<chunks>(row, column / 8) + column % 8);
        if (task.residual) {
            const float2 past = __bfloat1622float2(held);
            v0 += past.x, v1 += past.y;
        }
        held = __floats2bfloat162_rn(v0, v1);
    });
    __syncthreads();
    constexpr int own = width / 8;
    for (int i = threadIdx.x; i < P::m * own; i += P::threads) {
        const int line = i / own, chunk = i % own;
        const int row = row0 + line, column = column0 + 8 * chunk;
        if (row >= task.rows || column >= output.width) continue;
        const size_t to = size_t(row) * output.ld + column;
        const uint4 v = *reinterpret_cast<const uint4*>(shared.tile + place<chunks>(line, chunk));
        *reinterpret_cast<uint4*>(output.y + to) = v;
        if constexpr (pair) {
            const uint4 u = *reinterpret_cast<const uint4*>(shared.tile + place<chunks>(line, own + chunk));
            *reinterpret_cast<uint4*>(task.output[1].y + to) = u;
            const unsigned gates[4] = {v.x, v.y, v.z, v.w}, ups[4] = {u.x, u.y, u.z, u.w};
            unsigned products[4];
#pragma unroll
            for (int p = 0; p < 4; p++) {
                const float z0 = __uint_as_float(gates[p] << 16), z1 = __uint_as_float(gates[p] & 0xffff0000u);
                const float u0 = __uint_as_float(ups[p] << 16), u1 = __uint_as_float(ups[p] & 0xffff0000u);
                const __nv_bfloat162 h = __floats2bfloat162_rn(u0 * (z0 * sigmoid(z0)), u1 * (z1 * sigmoid(z1)));
                products[p] = __bfloat16_as_ushort(h.x) | unsigned(__bfloat16_as_ushort(h.y)) << 16;
            }
            *reinterpret_cast<uint4*>(task.h + to) = make_uint4(products[0], products[1], products[2], products[3]);
        }
    }
}

using Small = Product<64, 64, 2, 2, 4, true, true>;
using Square = Product<128, 128, 2, 2, 4, true, true>;
using Wide = Product<128, 256, 2, 4, 4, true, true>;
using SmallPair = Product<64, 64, 2, 2, 4, true, true, 2>;
using SquarePair = Product<128, 128, 2, 2, 4, true, true, 2>;
using WidePair = Product<128, 256, 2, 4, 4, true, true, 2>;

extern "C" __global__ void __launch_bounds__(128) linear_64(const __grid_constant__ Task task) {
    SHARED(Shared<Small>, shared);
    linear_tile<Small, false>(task, shared);
}
KERNEL(linear_64)
KERNEL_SHARED(linear_64, Shared<Small>)

extern "C" __global__ void __launch_bounds__(128, 2) linear_128(const __grid_constant__ Task task) {
    SHARED(Shared<Square>, shared);
    linear_tile<Square, false>(task, shared);
}
KERNEL(linear_128)
KERNEL_SHARED(linear_128, Shared<Square>)

extern "C" __global__ void __launch_bounds__(256, 1) linear_256(const __grid_constant__ Task task) {
    SHARED(Shared<Wide>, shared);
    linear_tile<Wide, false>(task, shared);
}
KERNEL(linear_256)
KERNEL_SHARED(linear_256, Shared<Wide>)

extern "C" __global__ void __launch_bounds__(128) linear_swiglu_64(const __grid_constant__ Task task) {
    SHARED(Shared<SmallPair>, shared);
    linear_tile<SmallPair, true>(task, shared);
}
KERNEL(linear_swiglu_64)
KERNEL_SHARED(linear_swiglu_64, Shared<SmallPair>)

extern "C" __global__ void __launch_bounds__(128, 2) linear_swiglu_128(const __grid_constant__ Task task) {
    SHARED(Shared<SquarePair>, shared);
    linear_tile<SquarePair, true>(task, shared);
}
KERNEL(linear_swiglu_128)
KERNEL_SHARED(linear_swiglu_128, Shared<SquarePair>)

extern "C" __global__ void __launch_bounds__(256, 1) linear_swiglu_256(const __grid_constant__ Task task) {
    SHARED(Shared<WidePair>, shared);
    linear_tile<WidePair, true>(task, shared);
}
KERNEL(linear_swiglu_256)
KERNEL_SHARED(linear_swiglu_256, Shared<WidePair>)
