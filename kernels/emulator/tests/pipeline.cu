// pipeline: c[M, N] = a[M, K] · b[N, K]ᵀ, bf16 in, f32 sums, one rounding: the shape of a real product, for the emulator's tests.
//
// Blocks of 64 × 64, four warps of 32 × 32, k in steps of 32 through three stages of cp.async. K is a multiple of 8.
#include "fragments.cuh"
#include "kernel.cuh"
#include "ptx.cuh"

constexpr int tile = 64, depth = 32, stages = 3, pitch = depth + 8;

struct Shared {
    __align__(16) bf16 a[stages][tile][pitch];
    __align__(16) bf16 b[stages][tile][pitch];
};

__device__ __forceinline__ void load_tile(bf16 (&to)[tile][pitch], const bf16* from, int row0, int rows, int k0, int k) {
    for (int i = threadIdx.x; i < tile * depth / 8; i += blockDim.x) {
        const int row = i / (depth / 8), column = i % (depth / 8) * 8;
        const bool inside = row0 + row < rows && k0 + column < k;
        ptx::copy_async<16>(&to[row][column], inside ? from + size_t(row0 + row) * k + k0 + column : from, inside ? 16 : 0);
    }
}

extern "C" __global__ void __launch_bounds__(128)
    pipeline(bf16* c, const bf16* a, const bf16* b, int m, int n, int k) {
    SHARED(Shared, shared);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int m0 = blockIdx.y * tile, n0 = blockIdx.x * tile, warp_m = warp % 2 * 32, warp_n = warp / 2 * 32;
    const int steps = (k + depth - 1) / depth;

    for (int s = 0; s < stages - 1; s++) {
        if (s < steps) {
            load_tile(shared.a[s], a, m0, m, s * depth, k);
            load_tile(shared.b[s], b, n0, n, s * depth, k);
        }
        ptx::copy_async_commit();
    }
    float sum[2][4][4] = {};
    for (int step = 0; step < steps; step++) {
        ptx::copy_async_wait<stages - 2>();
        __syncthreads(); // the stage has landed for all; the one filled below has been read by all
        if (const int next = step + stages - 1; next < steps) {
            load_tile(shared.a[next % stages], a, m0, m, next * depth, k);
            load_tile(shared.b[next % stages], b, n0, n, next * depth, k);
        }
        ptx::copy_async_commit(); // an empty group at the end keeps the count
        const auto& ta = shared.a[step % stages];
        const auto& tb = shared.b[step % stages];
#pragma unroll
        for (int kk = 0; kk < depth; kk += 16) {
            uint32_t fa[2][4], fb[2][4];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                ptx::ldmatrix_x4(fa[i], &ta[warp_m + 16 * i + lane % 16][kk + lane / 16 * 8]);
                ptx::ldmatrix_x4(fb[i], &tb[warp_n + 16 * i + lane % 8 + lane / 16 * 8][kk + lane / 8 % 2 * 8]);
            }
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) ptx::mma_m16n8k16(sum[i][j], fa[i], fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1]);
        }
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int row = m0 + warp_m + 16 * i + fragments::c_row(lane, e), column = n0 + warp_n + 8 * j + fragments::c_column(lane, e);
                if (row < m && column < n) c[size_t(row) * n + column] = __float2bfloat16_rn(sum[i][j][e]);
            }
}
KERNEL(pipeline)
KERNEL_SHARED(pipeline, Shared)
