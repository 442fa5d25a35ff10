// linear, linear_swiglu: as in linear.cu, of up to twelve groups of rows with an adapter in all outputs.
//
// A group is a segment of K of its own (lib/product_sm90.cuh) whose map of t begins at the group's first row and has no
// more rows than it, so that rows of others are zero. A tile has 128 rows of one copy of x and 256 columns of one output,
// of linear_swiglu the same 128 columns of both; every output has ⌈width / 256⌉ tiles across, all outputs side by side have
// `across`, of linear_swiglu ⌈width / 128⌉. gridDim.x is any number of blocks, at best one a multiprocessor.
// Maps are of boxes of 128 rows × 64 columns. All leading dimensions are multiples of 8; padding of inputs is never read,
// that of y and h becomes zero up to the next multiple of 8. f32 sums, y rounds once, h from the rounded gate and up in
// f32, once.
#define SHARED_MOST 232448
#include "kernel.cuh"
#include "product_sm90.cuh"
#include "raster.cuh"
#include "sigmoid.cuh"

using namespace warpgroups;

constexpr int GROUPS = 12;

struct Output {
    bf16* y;
    const float* bias; // null for none
    int width, ld;
    int groups_end; // of its groups; they begin where those of the output before end
    int tiles_end;  // of its tiles across
};
/// Rows `start..end` of an output have an adapter.
struct Rows {
    int start, end, rank, unused;
};
struct Task {
    ptx::TensorMap x;
    ptx::TensorMap w[4];
    ptx::TensorMap t[GROUPS]; // of the group's rows
    ptx::TensorMap factor[GROUPS]; // s·B
    const bf16* residual; // of the one output, null for none
    bf16* h;              // linear_swiglu only
    int tokens, copies, inner, across;
    Output output[4];
    Rows group[GROUPS];
};
static_assert(sizeof(Task) <= 4096, "what a kernel takes by value");

/// A tile's output, its first row of y and of x, how many rows it has, and its first column.
struct Tile {
    int output, row, token, rows, column;
};

template <bool pair>
__device__ __forceinline__ Tile tile_of(const Task& task, int index, int down) {
    const Place at = raster(index, task.copies * down, task.across);
    Tile tile;
    tile.output = 0;
    if constexpr (!pair)
        while (at.across >= task.output[tile.output].tiles_end) tile.output++;
    tile.token = at.down % down * ROWS;
    tile.row = at.down / down * task.tokens + tile.token;
    tile.rows = min(task.tokens - tile.token, ROWS);
    const int first = tile.output > 0 ? task.output[tile.output - 1].tiles_end : 0;
    tile.column = (at.across - first) * (pair ? COLUMNS / 2 : COLUMNS);
    return tile;
}

/// The segments of a tile: the first, then those after group `group`, of which there may be none.
template <bool pair>
__device__ __forceinline__ Segment first_segment(const Task& task, const Tile& tile, int& group) {
    const int j = tile.output, column = tile.column;
    group = j > 0 ? task.output[j - 1].groups_end : 0;
    return {&task.x, {&task.w[j], &task.w[pair ? 1 : j]}, tile.token, {column, pair ? column : column + BOX}, task.inner};
}
template <bool pair>
__device__ __forceinline__ bool next_segment(const Task& task, const Tile& tile, int& group, Segment& segment) {
    for (; group < task.output[pair ? 1 : tile.output].groups_end; group++) {
        const Rows& rows = task.group[group];
        if (rows.start >= tile.row + tile.rows || rows.end <= tile.row) continue;
        // Of a pair, the columns of the other panel lie past the end.
        const int width = task.output[0].width;
        const bool up = pair && group >= task.output[0].groups_end;
        const int first = up ? width : tile.column, second = up ? tile.column : pair ? width : tile.column + BOX;
        const ptx::TensorMap* factor = &task.factor[group];
        segment = {&task.t[group], {factor, factor}, tile.row - rows.start, {first, second}, rows.rank};
        group++;
        return true;
    }
    return false;
}

template <bool pair>
__device__ __forceinline__ void linear(const Task& task, Ring& ring) {
    open(ring);
    const int down = (task.tokens + ROWS - 1) / ROWS, tiles = task.copies * down * task.across;
    if (threadIdx.x < 128) {
        ptx::registers_release<40>();
        if (threadIdx.x > 0) return;
        Stage stage;
        for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
            const Tile tile = tile_of<pair>(task, index, down);
            int group;
            Segment segment = first_segment<pair>(task, tile, group);
            do copy<false>(ring, stage, segment);
            while (next_segment<pair>(task, tile, group, segment));
        }
        return;
    }
    ptx::registers_claim<232>();
    Product<false> product;
    for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
        const Tile tile = tile_of<pair>(task, index, down);
        int group;
        Segment segment = first_segment<pair>(task, tile, group);
        product.clear();
        do product.multiply(ring, segment.k);
        while (next_segment<pair>(task, tile, group, segment));
        product.finish(ring);

        const int first = 16 * Product<false>::warp(), rows = tile.rows - first, lane = threadIdx.x % 32;
#pragma unroll
        for (int pass = 0; pass < COLUMNS / PASS; pass++) {
            const Output& output = task.output[pair ? pass : tile.output];
            const int column = pair ? tile.column : tile.column + PASS * pass, columns = output.width - column;
            const size_t at = size_t(tile.row + first) * output.ld + column;
            const bf16* residual = task.residual ? task.residual + at : nullptr;
            Product<false>::write(ring, output.y + at, residual, output.ld, rows, columns, [&](int j, int h) {
                float* v = product.d + PASS / 2 * pass + 4 * j + 2 * h;
                if (output.bias) {
                    const int c = 8 * j + fragments::c_column(lane, 0);
                    v[0] += c < columns ? output.bias[column + c] : 0.0f;
                    v[1] += c + 1 < columns ? output.bias[column + c + 1] : 0.0f;
                }
                if constexpr (pair) {
                    // h is of what is written.
                    const float2 rounded = __bfloat1622float2(__floats2bfloat162_rn(v[0], v[1]));
                    v[0] = rounded.x, v[1] = rounded.y;
                }
                return make_float2(v[0], v[1]);
            });
        }
        if constexpr (pair) {
            const Output& output = task.output[0];
            const size_t at = size_t(tile.row + first) * output.ld + tile.column;
            const int columns = output.width - tile.column;
            Product<false>::write(ring, task.h + at, nullptr, output.ld, rows, columns, [&](int j, int h) {
                const float *z = product.d + 4 * j + 2 * h, *u = z + PASS / 2;
                return make_float2(u[0] * (z[0] * sigmoid(z[0])), u[1] * (z[1] * sigmoid(z[1])));
            });
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) linear_sm90(const __grid_constant__ Task task) {
    SHARED(Ring, ring);
    linear<false>(task, ring);
}
KERNEL(linear_sm90)
KERNEL_SHARED(linear_sm90, Ring)

extern "C" __global__ void __launch_bounds__(THREADS, 1) linear_swiglu_sm90(const __grid_constant__ Task task) {
    SHARED(Ring, ring);
    linear<true>(task, ring);
}
KERNEL(linear_swiglu_sm90)
KERNEL_SHARED(linear_swiglu_sm90, Ring)
