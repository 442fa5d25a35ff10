// apply: out = x w in f64, for each stack x[n, P] and w[P, P] of a table
//
// A block of 256 threads a tile of 16, 32 or 64 columns of one out and 4096 / columns of its rows; a thread holds 4 × 4 sums, each
// from the first column of x to the last. P may be anything.
#include "kernel.cuh"
#include "table.cuh"

struct Stack {
    uint64_t x, w;                   // elements from the start; out lies where x does
    uint32_t first;                  // block
    uint32_t rows, rank;             // n, P
    uint32_t side;                   // columns of a tile
};
constexpr int slice = 16;            // columns of x at a time
struct Shared {
    double x[256 * (slice + 1)];     // rows lie slice + 1 apart
    double w[slice][64];
};

extern "C" __global__ void __launch_bounds__(256)
    apply(double* out, const double* x, const double* w, const Stack* table, int stacks) {
    SHARED(Shared, shared);
    const Stack stack = entry_of(table, stacks, blockIdx.x);
    const int side = stack.side, rank = stack.rank, height = 4096 / side;
    const int across = (rank + side - 1) / side, tile = blockIdx.x - stack.first;
    const int64_t top = int64_t(tile / across) * height;
    const int left = tile % across * side;
    const int width = side / 4, i = threadIdx.x / width * 4, j = threadIdx.x % width * 4;
    x += stack.x;
    w += stack.w;
    out += stack.x;

    double sum[4][4] = {};
    for (int begin = 0; begin < rank; begin += slice) {
        for (int at = threadIdx.x; at < height * slice; at += 256) {
            const int64_t r = top + at / slice;
            const int c = begin + at % slice;
            shared.x[at / slice * (slice + 1) + at % slice] = r < stack.rows && c < rank ? x[r * rank + c] : 0.0;
        }
        for (int at = threadIdx.x; at < slice * side; at += 256) {
            const int r = begin + at / side, c = left + at % side;
            shared.w[at / side][at % side] = r < rank && c < rank ? w[int64_t(r) * rank + c] : 0.0;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < slice; k++) {
#pragma unroll
            for (int u = 0; u < 4; u++) {
                const double a = shared.x[(i + u) * (slice + 1) + k];
#pragma unroll
                for (int c = 0; c < 4; c++) sum[u][c] += a * shared.w[k][j + c];
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int u = 0; u < 4; u++)
#pragma unroll
        for (int c = 0; c < 4; c++)
            if (top + i + u < stack.rows && left + j + c < rank) out[(top + i + u) * rank + left + j + c] = sum[u][c];
}
KERNEL(apply)
KERNEL_SHARED(apply, Shared)
