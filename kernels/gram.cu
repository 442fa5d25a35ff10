// gram: out = xᵀ x in f64, for each stack x[n, P] of a table; out is exactly symmetric
//
// A block of 256 threads a tile of 16, 32 or 64 rows and columns of one out, on or below its diagonal: a thread holds
// 4 × 4 sums, groups of threads share the rows of x, n-th row to group n mod groups, and their sums are added up in the
// order of the groups. P may be anything.
#include "kernel.cuh"
#include "table.cuh"

struct Stack {
    uint64_t x, out;                 // elements from the start
    uint32_t first;                  // block
    uint32_t rows, rank;             // n, P
    uint32_t side;                   // 16, 32 or 64
};
struct Shared {
    union {
        double x[2][2048];           // rows of the tile's columns of x: those of out's rows, those of its columns
        double sums[4096];
    };
};

extern "C" __global__ void __launch_bounds__(256) gram(double* out, const double* x, const Stack* table, int stacks) {
    SHARED(Shared, shared);
    const Stack stack = entry_of(table, stacks, blockIdx.x);
    const int side = stack.side, rank = stack.rank;
    // Tile (row, column) of the lower triangle.
    int row = 0, column = blockIdx.x - stack.first;
    while (column > row) column -= ++row;
    const int width = side / 4, members = width * width, groups = 256 / members;
    const int group = threadIdx.x / members, i = threadIdx.x % members / width * 4, j = threadIdx.x % width * 4;
    const int chunk = 2048 / side;
    x += stack.x;

    double sum[4][4] = {};
    for (int64_t begin = 0; begin < stack.rows; begin += chunk) {
        for (int at = threadIdx.x; at < 2 * 2048; at += 256) {
            const int which = at / 2048, r = at % 2048 / side, c = (which ? column : row) * side + at % side;
            const bool there = begin + r < stack.rows && c < rank;
            shared.x[which][at % 2048] = there ? x[(begin + r) * rank + c] : 0.0;
        }
        __syncthreads();
        for (int r = group; r < chunk; r += groups) {
            const double *left = shared.x[0] + r * side + i, *right = shared.x[1] + r * side + j;
            const double a[4] = {left[0], left[1], left[2], left[3]}, b[4] = {right[0], right[1], right[2], right[3]};
#pragma unroll
            for (int u = 0; u < 4; u++)
#pragma unroll
                for (int w = 0; w < 4; w++) sum[u][w] += a[u] * b[w];
        }
        __syncthreads();
    }

#pragma unroll
    for (int u = 0; u < 4; u++)
#pragma unroll
        for (int w = 0; w < 4; w++) shared.sums[group * side * side + (i + u) * side + j + w] = sum[u][w];
    __syncthreads();
    out += stack.out;
    for (int at = threadIdx.x; at < side * side; at += 256) {
        const int r = row * side + at / side, c = column * side + at % side;
        if (r >= rank || c > r) continue;
        double total = shared.sums[at];
        for (int g = 1; g < groups; g++) total += shared.sums[g * side * side + at];
        out[int64_t(r) * rank + c] = total;
        out[int64_t(c) * rank + r] = total;
    }
}
KERNEL(gram)
KERNEL_SHARED(gram, Shared)
