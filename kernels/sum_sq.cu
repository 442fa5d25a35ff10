// sum_sq: out[0] = Σ x², in f64
//
// First `sum_sq` with n ≤ 1,024 blocks of 256 threads, which leaves a sum a block in this module's own memory, then
// `sum_sq_total` with one block of 256 threads and the number of blocks. The number of blocks must be a function of n
// alone: it is the order of the sum. x starts at a multiple of 16 bytes.
#include "kernel.cuh"
#include "reduce.cuh"

struct Shared {
    double sums[8];
};

static __device__ double partial[1024];

extern "C" __global__ void __launch_bounds__(256) sum_sq(const float* x, int64_t n) {
    SHARED(Shared, shared);
    const int64_t step = int64_t(gridDim.x) * blockDim.x, first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    const float4* four = reinterpret_cast<const float4*>(x);
    double sum = 0.0;
    for (int64_t i = first; i < n / 4; i += step) {
        const float4 v = four[i];
        sum += double(v.x) * v.x;
        sum += double(v.y) * v.y;
        sum += double(v.z) * v.z;
        sum += double(v.w) * v.w;
    }
    if (const int64_t i = n / 4 * 4 + first; i < n) sum += double(x[i]) * x[i];
    sum = block_sum(sum, shared.sums);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}
KERNEL(sum_sq)
KERNEL_SHARED(sum_sq, Shared)

extern "C" __global__ void __launch_bounds__(256) sum_sq_total(double* out, int blocks) {
    SHARED(Shared, shared);
    double sum = 0.0;
    for (int i = threadIdx.x; i < blocks; i += blockDim.x) sum += partial[i];
    sum = block_sum(sum, shared.sums);
    if (threadIdx.x == 0) out[0] = sum;
}
KERNEL(sum_sq_total)
KERNEL_SHARED(sum_sq_total, Shared)
