// merge_bf16|f16|f32: w[r, c] = round(w[r, c] + Σ_u Σ_k f32(scale b[r, k]) a[k, c]) over the updates u of a table, and
// sums[16 rows] = (Σ (w' − w − update)², Σ update²)
//
// A block of 256 threads takes 16 rows, a thread every 256th column of them. Sums are f64, of the updates in their order
// and of each in the order of k; products of two f32 are exact, so every device gets the same bytes of w. Anything may be odd.
#include "kernel.cuh"
#include "reduce.cuh"
#include "round.cuh"

struct Update {
    uint64_t a, b;                   // where they lie, [rank, I] and [O, rank]
    uint32_t rank;
    float scale;
};
constexpr int height = 16, slice = 64;
struct Shared {
    double b[slice][height];
    double sums[8], more[8];
};

template <class T>
__device__ __forceinline__ void merge(Shared& shared, T* w, double* sums, const Update* table, int updates, int rows, int inner) {
    const int row0 = blockIdx.x * height;
    double lost = 0.0, size = 0.0;
    for (int column0 = 0; column0 < inner; column0 += 256) {
        const int column = column0 + threadIdx.x;
        double delta[height] = {};
        for (int u = 0; u < updates; u++) {
            const Update& update = table[u];
            const float *a = reinterpret_cast<const float*>(update.a), *b = reinterpret_cast<const float*>(update.b);
            const int rank = update.rank;
            for (int first = 0; first < rank; first += slice) {
                const int ranks = min(slice, rank - first);
                __syncthreads(); // all are done with the slice before
                for (int at = threadIdx.x; at < height * ranks; at += 256) {
                    const int r = row0 + at / ranks, k = at % ranks;
                    shared.b[k][at / ranks] = r < rows ? update.scale * b[size_t(r) * rank + first + k] : 0.0f;
                }
                __syncthreads();
                if (column >= inner) continue;
                for (int k = 0; k < ranks; k++) {
                    const double x = a[size_t(first + k) * inner + column];
#pragma unroll
                    for (int r = 0; r < height; r++) delta[r] += shared.b[k][r] * x;
                }
            }
        }
#pragma unroll
        for (int r = 0; r < height; r++) {
            if (row0 + r >= rows || column >= inner) continue;
            T& place = w[size_t(row0 + r) * inner + column];
            const double old = widen(place);
            narrow(place, old + delta[r]);
            const double missing = widen(place) - old - delta[r];
            lost += missing * missing;
            size += delta[r] * delta[r];
        }
    }
    lost = block_sum(lost, shared.sums);
    size = block_sum(size, shared.more);
    if (threadIdx.x == 0) sums[2 * blockIdx.x] = lost, sums[2 * blockIdx.x + 1] = size;
}

#define MERGE(name, T)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        name(T* w, double* sums, const Update* table, int updates, int rows, int inner) {                              \
        SHARED(Shared, shared);                                                                                        \
        merge<T>(shared, w, sums, table, updates, rows, inner);                                                        \
    }                                                                                                                  \
    KERNEL(name)                                                                                                       \
    KERNEL_SHARED(name, Shared)

MERGE(merge_bf16, bf16)
MERGE(merge_f16, Half)
MERGE(merge_f32, float)
