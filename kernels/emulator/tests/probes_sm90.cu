// Small kernels of mbarriers, copies of tiles and wgmma: what the twins do right and what they must catch (probes_sm90.h
// launches them).
#include "fragments.cuh"
#include "kernel.cuh"
#include "ptx_sm90.cuh"

struct Box {
    bf16 tile[64 * 64];
    uint64_t there;
};

// The box as it lies in shared memory.
extern "C" __global__ void probe_box(uint16_t* out, const __grid_constant__ ptx::TensorMap map, int x, int y, int bytes) {
    SHARED(Box, shared);
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(&shared.there, 1);
        ptx::fence_proxy_async();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        ptx::mbarrier_arrive_expect(&shared.there, bytes);
        ptx::copy_tile(shared.tile, map, &shared.there, x, y);
    }
    ptx::mbarrier_wait(&shared.there, 0);
    for (int i = threadIdx.x; i < bytes / 2; i += blockDim.x) out[i] = __bfloat16_as_ushort(shared.tile[i]);
}
KERNEL(probe_box)
KERNEL_SHARED(probe_box, Box)

template <int n>
struct Operands {
    bf16 a[64 * 64];
    bf16 b[n * 64];
    uint64_t there;
};

// d[64, n] = a[64, 64] · b, twice: the second product is added to the first. b is [n, 64], or [64, n] where `across`.
template <int n, bool across>
__device__ __forceinline__ void product(float* out, const bf16* a, const ptx::TensorMap& map_a, const ptx::TensorMap& map_b, bool registers) {
    SHARED(Operands<n>, shared);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(&shared.there, 1);
        ptx::fence_proxy_async();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        ptx::mbarrier_arrive_expect(&shared.there, sizeof shared.a + sizeof shared.b);
        ptx::copy_tile(shared.a, map_a, &shared.there, 0, 0);
        for (int i = 0; i < n; i += 64) ptx::copy_tile(shared.b + 64 * i, map_b, &shared.there, across ? i : 0, across ? 0 : i);
    }
    ptx::mbarrier_wait(&shared.there, 0);
    float d[n / 2] = {};
    const uint64_t left = ptx::swizzled(shared.a), right = ptx::swizzled(shared.b, across ? 64 * 128 : 16);
    for (int round = 0; round < 2; round++) {
        for (int step = 0; step < 4; step++) {
            if constexpr (n <= 128) {
                uint32_t fragment[4];
                for (int i = 0; i < 4; i++)
                    fragment[i] = *reinterpret_cast<const uint32_t*>(a + (16 * warp + fragments::a_row(lane, i)) * 64 + 16 * step + fragments::a_k(lane, i, 0));
                ptx::wgmma_fence();
                if (registers) ptx::wgmma<n, across>(d, fragment, right + (across ? 128 : 2) * step);
                else ptx::wgmma<n, across>(d, left + 2 * step, right + (across ? 128 : 2) * step);
            } else {
                ptx::wgmma_fence();
                ptx::wgmma<n, across>(d, left + 2 * step, right + (across ? 128 : 2) * step);
            }
            ptx::wgmma_commit();
            ptx::wgmma_wait<0>();
        }
    }
    for (int j = 0; j < n / 8; j++)
        for (int i = 0; i < 4; i++)
            out[(16 * warp + fragments::c_row(lane, i)) * n + 8 * j + fragments::c_column(lane, i)] = d[4 * j + i];
}

#define PROBE_WGMMA(name, n, across)                                                                                       \
    extern "C" __global__ void name(float* out, const bf16* a, const __grid_constant__ ptx::TensorMap map_a,               \
                                    const __grid_constant__ ptx::TensorMap map_b, int registers) {                        \
        product<n, across>(out, a, map_a, map_b, registers != 0);                                                          \
    }                                                                                                                      \
    KERNEL(name)                                                                                                           \
    KERNEL_SHARED(name, Operands<n>)

PROBE_WGMMA(probe_wgmma_64, 64, false)
PROBE_WGMMA(probe_wgmma_128, 128, false)
PROBE_WGMMA(probe_wgmma_256, 256, false)
PROBE_WGMMA(probe_wgmma_64_across, 64, true)
PROBE_WGMMA(probe_wgmma_128_across, 128, true)
PROBE_WGMMA(probe_wgmma_256_across, 256, true)

struct Mistakes {
    bf16 tile[2][64 * 64];
    uint64_t there, used;
};

/// Stores what is there.
__device__ __forceinline__ void rewrite(bf16* p) {
    volatile uint16_t* bits = reinterpret_cast<volatile uint16_t*>(p);
    *bits = *bits;
}

// sum[64, 64] = Σ over two boxes of box · boxᵀ through one place, by a warp that copies and four that multiply; or with
// the mistake of this number.
extern "C" __global__ void probe_mistake(float* out, const __grid_constant__ ptx::TensorMap map, int mistake) {
    SHARED(Mistakes, shared);
    bf16* tile = shared.tile[mistake == 1 ? 1 : 0] + (mistake == 1 ? -32 : 0);
    if (threadIdx.x == 0) {
        if (mistake != 2) ptx::mbarrier_init(&shared.there, 1);
        ptx::mbarrier_init(&shared.used, mistake == 3 ? 5 : 4);
        if (mistake != 4) ptx::fence_proxy_async();
    }
    if (mistake != 5) __syncthreads();
    if (threadIdx.x >= 128) {
        if (threadIdx.x > 128) return;
        for (int round = 0; round < 2; round++) {
            if (round > 0 && mistake != 6) ptx::mbarrier_wait(&shared.used, 0);
            if (mistake != 7) ptx::mbarrier_arrive_expect(&shared.there, sizeof shared.tile[0] + (mistake == 8 ? 16 : 0));
            if (mistake == 16) ptx::mbarrier_arrive(&shared.there);
            ptx::copy_tile(tile, map, &shared.there, 0, 64 * round);
        }
        return;
    }
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float d[32];
    for (float& sum : d) sum = 0;
    for (int round = 0; round < 2; round++) {
        if (mistake != 9) ptx::mbarrier_wait(&shared.there, round);
        if (mistake == 10 && round == 0) {
            rewrite(tile + threadIdx.x);
            ptx::barrier_sync(1, 128);
        }
        if (mistake == 11 && round == 0) {
            rewrite(tile + threadIdx.x);
            ptx::fence_proxy_async();
            ptx::barrier_sync(1, 128);
        }
        if (mistake != 12) ptx::wgmma_fence();
        for (int step = 0; step < 4; step++) ptx::wgmma<64, false>(d, ptx::swizzled(tile) + 2 * step, ptx::swizzled(tile) + 2 * step);
        if (mistake != 13) ptx::wgmma_commit();
        if (mistake == 14) {
            if (round > 0) ptx::wgmma_wait<0>();
        } else if (mistake == 15) {
            ptx::wgmma_wait<1>();
        } else {
            ptx::wgmma_wait<0>();
        }
        if (lane == 0 && round == 0) ptx::mbarrier_arrive(&shared.used);
    }
    for (int j = 0; j < 8; j++)
        for (int i = 0; i < 4; i++)
            out[(16 * warp + fragments::c_row(lane, i)) * 64 + 8 * j + fragments::c_column(lane, i)] = d[4 * j + i];
}
KERNEL(probe_mistake)
KERNEL_SHARED(probe_mistake, Mistakes)
