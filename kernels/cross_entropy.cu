// Loss and gradient of supervised rows with a frozen head W[V, D], a chunk of rows at a time:
// cross_entropy_logits: logits[r, v] = x[rows[r]] · W[v], f32
// cross_entropy_gradient: nll[r] = lse − logits[r, target], and in the logits' place g[r, v] = bf16(weight · (e^(logits − lse) −
//   [v = target])): row r of g starts where row r of the logits does
// cross_entropy_product: partial[s, r, d] = Σ_v g[r, v] W[v, d] over the v of slice s
// cross_entropy_sum: dx[rows[r], d] = bf16(Σ_s partial[s, r, d])
//
// _logits: a block makes 128 rows × 128 words, gridDim = (⌈V / 128⌉, ⌈rows / 128⌉). _gradient: a block a row, any number of
// warps. _product: a block makes 128 rows × 128 columns of one slice, gridDim = (⌈D / 128⌉, ⌈rows / 128⌉, slices), `slice` words
// each, a multiple of 8. _sum: gridDim = (rows, ·), a thread eight columns.
// ld_v, ld_d, ld_x, ld_w, the leading dimensions of logits, partial sums, x and dx, and W, are multiples of 8; padding of
// inputs is never read, that of dx becomes zero up to the next multiple of 8.
// Sums in f32, slices in their order; g rounds to bf16, dx once more.
#include "kernel.cuh"
#include "log_sum_exp.cuh"
#include "product.cuh"

using namespace product;

using Logits = Product<128, 128, 2, 2, 4, true, true>;
using Gradient = Product<128, 128, 2, 2, 4, true, false>;

extern "C" __global__ void __launch_bounds__(128, 2)
    cross_entropy_logits(float* logits, const bf16* x, const bf16* w, const uint32_t* rows, int count, int vocab, int width,
                         int ld_v, int ld_x, int ld_w) {
    SHARED(Logits::Ring, shared);
    const int row0 = blockIdx.y * Logits::m, word0 = blockIdx.x * Logits::n;
    Logits product;
    product.clear();
    product.add(shared, [&](int segment, Logits::CopyA& a, Logits::CopyB& b) {
        if (segment > 0) return 0;
        a.open({x}, ld_x, width, [&](int line) { return row0 + line < count ? int(rows[row0 + line]) : -1; });
        b.open({w}, ld_w, width, [&](int line) { return word0 + line < vocab ? word0 + line : -1; });
        return width;
    });
    product.each([&](int row, int column, float v0, float v1) {
        // What lies between V and ld_v is room.
        if (row0 + row < count && word0 + column < vocab)
            *reinterpret_cast<float2*>(logits + size_t(row0 + row) * ld_v + word0 + column) = make_float2(v0, v1);
    });
}
KERNEL(cross_entropy_logits)
KERNEL_SHARED(cross_entropy_logits, Logits::Ring)

extern "C" __global__ void __launch_bounds__(1024)
    cross_entropy_gradient(float* nll, float* logits, const uint32_t* targets, int vocab, int ld_v, float weight) {
    SHARED(LogSumExp, shared);
    float* row = logits + size_t(blockIdx.x) * ld_v;
    const float lse = log_sum_exp(row, vocab, shared);
    const int target = targets[blockIdx.x];
    if (threadIdx.x == 0) nll[blockIdx.x] = lse - row[target];

    bf16* g = reinterpret_cast<bf16*>(row);
    for (int start = 0; start < vocab; start += 8 * blockDim.x) {
        const int d = start + 8 * threadIdx.x;
        float v[8] = {};
        if (d < vocab) load8(v, row + d, vocab - d);
        __syncthreads(); // these words are read, those to come lie further on
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = weight * (exp_below(v[i] - lse) - (d + i == target ? 1.0f : 0.0f));
        if (d < vocab) store8(g + d, v, vocab - d);
    }
}
KERNEL(cross_entropy_gradient)
KERNEL_SHARED(cross_entropy_gradient, LogSumExp)

extern "C" __global__ void __launch_bounds__(128, 2)
    cross_entropy_product(float* partial, const float* logits, const bf16* w, int count, int vocab, int width, int slice, int ld_v,
                          int ld_d, int ld_w) {
    SHARED(Gradient::Ring, shared);
    const int row0 = blockIdx.y * Gradient::m, column0 = blockIdx.x * Gradient::n, word0 = blockIdx.z * slice;
    const int words = min(slice, vocab - word0);
    const bf16* g = reinterpret_cast<const bf16*>(logits) + word0;
    Gradient product;
    product.clear();
    product.add(shared, [&](int segment, Gradient::CopyA& a, Gradient::CopyB& b) {
        if (segment > 0) return 0;
        a.open({g}, 2 * ld_v, words, [&](int line) { return row0 + line < count ? row0 + line : -1; });
        b.open(w + size_t(word0) * ld_w, ld_w, words, column0, width);
        return words;
    });
    float* slice_ = partial + size_t(blockIdx.z) * count * ld_d;
    product.each([&](int row, int column, float v0, float v1) {
        if (row0 + row < count && column0 + column < width)
            *reinterpret_cast<float2*>(slice_ + size_t(row0 + row) * ld_d + column0 + column) = make_float2(v0, v1);
    });
}
KERNEL(cross_entropy_product)
KERNEL_SHARED(cross_entropy_product, Gradient::Ring)

extern "C" __global__ void __launch_bounds__(256)
    cross_entropy_sum(bf16* dx, const float* partial, const uint32_t* rows, int width, int slices, int ld_d, int ld_x) {
    const int column = 8 * (blockIdx.y * blockDim.x + threadIdx.x), valid = width - column;
    if (valid <= 0) return;
    float sum[8] = {};
    for (int s = 0; s < slices; s++) {
        float v[8];
        load8(v, partial + (size_t(s) * gridDim.x + blockIdx.x) * ld_d + column, valid);
#pragma unroll
        for (int i = 0; i < 8; i++) sum[i] += v[i];
    }
    store8(dx + size_t(rows[blockIdx.x]) * ld_x + column, sum, valid);
}
KERNEL(cross_entropy_sum)
