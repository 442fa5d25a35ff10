// linear_bwd: as in linear_bwd.cu.
//
// The ranks of all outputs' adapters side by side are one segment of K (lib/product_sm90.cuh), each output's O another. A
// tile has 128 rows and 256 columns of dx; gridDim.x is any number of blocks, at best one a multiprocessor.
// Maps of u and dy are of boxes of 128 rows × 64 columns, those of A and W of 64 × 64. All leading dimensions are multiples
// of 8; padding of inputs is never read, that of dx becomes zero up to the next multiple of 8. f32 sums, dx rounds once.
#define SHARED_MOST 232448
#include "kernel.cuh"
#include "philox.cuh"
#include "product_sm90.cuh"
#include "raster.cuh"

using namespace warpgroups;

struct Task {
    ptx::TensorMap u, a;
    ptx::TensorMap dy[4], w[4];
    bf16* dx;
    int tokens, inner, ld_x, ranks, outputs, drops;
    int width[4];
    Dropout dropout;
};

/// The segments of a tile by number, that of the adapters first.
__device__ __forceinline__ int segments(const Task& task) { return (task.ranks > 0) + task.outputs; }
__device__ __forceinline__ Segment segment(const Task& task, int number, int row, int column) {
    const int j = number - (task.ranks > 0);
    return {j < 0 ? &task.u : &task.dy[j], {j < 0 ? &task.a : &task.w[j]}, row, {column}, j < 0 ? task.ranks : task.width[j]};
}

/// Multiplies the sums with the mask and 1 / (1 − p). The four lanes of a row share the numbers.
__device__ __forceinline__ void drop(Product<true>& product, const Task& task, int row, int column) {
    constexpr int parts = COLUMNS / 64;
    const int lane = threadIdx.x % 32, member = fragments::member(lane);
    unsigned long long mine[2] = {}; // of each half's row, 16 columns of each 64
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const uint64_t first = uint64_t(row + fragments::c_row(lane, 2 * h)) * unsigned(task.inner) + unsigned(column);
#pragma unroll 1
        for (int part = 0; part < parts; part++)
            mine[h] |= (unsigned long long)(kept<16>(task.dropout, first + 64 * part + 16 * member)) << 16 * part;
    }
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const unsigned bits = __shfl_sync(0xffffffffu, unsigned(mine[h] >> (16 * (j / 8))), j % 8 / 2, 4);
            const unsigned pair = bits >> (j % 2 * 8 + fragments::c_column(lane, 0));
            float* v = product.d + 4 * j + 2 * h;
            v[0] = pair & 1 ? v[0] * task.dropout.scale : 0.0f;
            v[1] = pair & 2 ? v[1] * task.dropout.scale : 0.0f;
        }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) linear_bwd_sm90(const __grid_constant__ Task task) {
    SHARED(Ring, ring);
    open(ring);
    const int down = (task.tokens + ROWS - 1) / ROWS, across = (task.inner + COLUMNS - 1) / COLUMNS, count = segments(task);
    if (threadIdx.x < 128) {
        ptx::registers_release<40>();
        if (threadIdx.x > 0) return;
        Stage stage;
        for (int index = blockIdx.x; index < down * across; index += gridDim.x) {
            const Place at = raster(index, down, across);
            for (int i = 0; i < count; i++) copy<true>(ring, stage, segment(task, i, at.down * ROWS, at.across * COLUMNS));
        }
        return;
    }
    ptx::registers_claim<232>();
    Product<true> product;
    for (int index = blockIdx.x; index < down * across; index += gridDim.x) {
        const Place at = raster(index, down, across);
        const int row = at.down * ROWS + 16 * Product<true>::warp(), column = at.across * COLUMNS;
        product.clear();
        for (int i = 0; i < count; i++) {
            product.multiply(ring, segment(task, i, 0, 0).k);
            if (i > 0 || !task.drops) continue;
            product.finish(ring);
            drop(product, task, row, column);
        }
        product.finish(ring);
#pragma unroll
        for (int pass = 0; pass < COLUMNS / PASS; pass++) {
            const int first = column + PASS * pass;
            const auto pair = [&](int j, int h) {
                const float* v = product.d + PASS / 2 * pass + 4 * j + 2 * h;
                return make_float2(v[0], v[1]);
            };
            bf16* to = task.dx + size_t(row) * task.ld_x + first;
            Product<true>::write(ring, to, nullptr, task.ld_x, task.tokens - row, task.inner - first, pair);
        }
    }
}
KERNEL(linear_bwd_sm90)
KERNEL_SHARED(linear_bwd_sm90, Ring)
