// Small kernels that show what the emulator does right and what it must catch (probes.cpp launches them).
#include "fragments.cuh"
#include "kernel.cuh"
#include "ptx.cuh"

struct Tiles {
    __align__(16) bf16 a[16][24];
    __align__(16) bf16 b[8][24];
    __align__(16) bf16 b_across[16][16];
};

// d[16, 8] = a[16, 16] · b[8, 16]ᵀ by one warp; then once more with b stored as [16, 8] and loaded transposed.
extern "C" __global__ void probe_product(float* d, float* d_across, const bf16* a, const bf16* b, const bf16* b_across) {
    SHARED(Tiles, tiles);
    const int lane = threadIdx.x;
    ptx::copy_async<16>(&tiles.a[lane / 2][lane % 2 * 8], a + lane * 8);
    if (lane < 16) {
        ptx::copy_async<16>(&tiles.b[lane / 2][lane % 2 * 8], b + lane * 8);
        ptx::copy_async<16>(&tiles.b_across[lane][0], b_across + lane * 8);
    }
    ptx::copy_async_commit();
    ptx::copy_async_wait<0>();
    __syncwarp();
    uint32_t fa[4], fb[2];
    float sum[4] = {}, sum_across[4] = {};
    ptx::ldmatrix_x4(fa, &tiles.a[lane % 16][lane / 16 * 8]);
    ptx::ldmatrix_x2(fb, &tiles.b[lane % 8][lane / 8 % 2 * 8]);
    ptx::mma_m16n8k16(sum, fa, fb[0], fb[1]);
    ptx::ldmatrix_x2_trans(fb, &tiles.b_across[lane % 16][0]);
    ptx::mma_m16n8k16(sum_across, fa, fb[0], fb[1]);
    for (int i = 0; i < 4; i++) {
        d[fragments::c_row(lane, i) * 8 + fragments::c_column(lane, i)] = sum[i];
        d_across[fragments::c_row(lane, i) * 8 + fragments::c_column(lane, i)] = sum_across[i];
    }
}
KERNEL(probe_product)

// d[16, 8] = a[16, 8] · b[8, 8]ᵀ in tf32.
extern "C" __global__ void probe_product_tf32(float* d, const float* a, const float* b) {
    const int lane = threadIdx.x;
    uint32_t fa[4], fb[2];
    for (int i = 0; i < 4; i++) fa[i] = ptx::to_tf32(a[fragments::a_row(lane, i) * 8 + fragments::a_k_tf32(lane, i)]);
    for (int i = 0; i < 2; i++) fb[i] = ptx::to_tf32(b[fragments::b_column(lane) * 8 + fragments::b_k_tf32(lane, i)]);
    float sum[4] = {};
    ptx::mma_m16n8k8_tf32(sum, fa, fb[0], fb[1]);
    for (int i = 0; i < 4; i++) d[fragments::c_row(lane, i) * 8 + fragments::c_column(lane, i)] = sum[i];
}
KERNEL(probe_product_tf32)

// Each lane's results of the warp functions, eight values a lane.
extern "C" __global__ void probe_warp(unsigned* out) {
    const unsigned all = 0xffffffffu;
    const int lane = threadIdx.x % 32;
    unsigned* mine = out + threadIdx.x * 8;
    mine[0] = __shfl_sync(all, lane * 10, lane + 1);
    mine[1] = __shfl_xor_sync(all, lane, 5);
    mine[2] = __shfl_down_sync(all, lane, 3, 16);
    mine[3] = __shfl_up_sync(all, lane, 3, 16);
    mine[4] = __ballot_sync(all, lane % 3 == 0);
    mine[5] = __any_sync(all, lane == 7) + 2 * __all_sync(all, lane < 31);
    mine[6] = __reduce_add_sync(all, unsigned(lane));
    if (lane < 16) mine[7] = __shfl_sync(0xffffu, lane, 15);
    else mine[7] = __reduce_min_sync(0xffff0000u, -lane);
}
KERNEL(probe_warp)

struct Exchange {
    unsigned values[1024];
};

// Reads what the thread at the other end of the block wrote.
extern "C" __global__ void probe_exchange(unsigned* out) {
    SHARED(Exchange, shared);
    shared.values[threadIdx.x] = threadIdx.x;
    __syncthreads();
    out[threadIdx.x] = shared.values[blockDim.x - 1 - threadIdx.x];
}
KERNEL(probe_exchange)
KERNEL_SHARED(probe_exchange, Exchange)

extern "C" __global__ void probe_exchange_without_barrier(unsigned* out) {
    SHARED(Exchange, shared);
    shared.values[threadIdx.x] = threadIdx.x;
    out[threadIdx.x] = shared.values[blockDim.x - 1 - threadIdx.x];
}
KERNEL(probe_exchange_without_barrier)

// Warp 0 makes, warp 1 takes, twice, through one place.
extern "C" __global__ void probe_named(unsigned* out) {
    SHARED(Exchange, shared);
    const int lane = threadIdx.x % 32;
    for (unsigned round = 0; round < 2; round++) {
        if (threadIdx.x < 32) {
            if (round > 0) ptx::barrier_sync(2, 64);
            shared.values[lane] = 100 * round + lane;
            ptx::barrier_arrive(1, 64);
        } else {
            ptx::barrier_sync(1, 64);
            out[32 * round + lane] = shared.values[31 - lane];
            if (round == 0) ptx::barrier_arrive(2, 64);
        }
    }
}
KERNEL(probe_named)

extern "C" __global__ void probe_copy_without_wait(float* out, const float* in) {
    SHARED(Exchange, shared);
    ptx::copy_async<4>(&shared.values[threadIdx.x], in + threadIdx.x);
    ptx::copy_async_commit();
    out[threadIdx.x] = __uint_as_float(shared.values[threadIdx.x]);
}
KERNEL(probe_copy_without_wait)

// A barrier of the block ends no copy: whoever waits for it is the thread that started it.
extern "C" __global__ void probe_copy_past_barrier(float* out, const float* in, int waits) {
    SHARED(Exchange, shared);
    ptx::copy_async<4>(&shared.values[threadIdx.x], in + threadIdx.x);
    ptx::copy_async_commit();
    if (waits) ptx::copy_async_wait<0>();
    __syncthreads();
    out[threadIdx.x] = __uint_as_float(shared.values[31 - threadIdx.x]);
}
KERNEL(probe_copy_past_barrier)

// Two groups in flight, the older one is waited for; the last bytes of a copy past its source are zero.
extern "C" __global__ void probe_copy_groups(uint4* out, const uint4* in) {
    SHARED(Exchange, shared);
    uint4* mine = reinterpret_cast<uint4*>(shared.values) + 2 * threadIdx.x;
    ptx::copy_async<16>(mine, in + threadIdx.x, 12);
    ptx::copy_async_commit();
    ptx::copy_async<16>(mine + 1, nullptr, 0);
    ptx::copy_async_commit();
    ptx::copy_async_wait<1>();
    out[2 * threadIdx.x] = mine[0];
    ptx::copy_async_wait<0>();
    out[2 * threadIdx.x + 1] = mine[1];
}
KERNEL(probe_copy_groups)

extern "C" __global__ void probe_half_at_barrier() {
    if (threadIdx.x < 32) __syncthreads();
}
KERNEL(probe_half_at_barrier)

extern "C" __global__ void probe_diverged_barrier() {
    if (threadIdx.x < 32)
        __syncthreads();
    else
        __syncthreads();
}
KERNEL(probe_diverged_barrier)

extern "C" __global__ void probe_wrong_mask(unsigned* out) { out[threadIdx.x] = __shfl_sync(0x0000ffffu, threadIdx.x, 0); }
KERNEL(probe_wrong_mask)

extern "C" __global__ void probe_write(unsigned* out, long long index) { out[index] = 1; }
KERNEL(probe_write)

extern "C" __global__ void probe_read(unsigned* out, const unsigned* in, long long index) { out[0] = in[index]; }
KERNEL(probe_read)

extern "C" __global__ void probe_shared_write(unsigned index) {
    SHARED(Exchange, shared);
    shared.values[index] = 1;
}
KERNEL(probe_shared_write)

__device__ int deep(int n, volatile int* keep) {
    volatile int frame[64];
    frame[n % 64] = n;
    return n ? deep(n - 1, frame) + frame[n % 64] + keep[0] : 0;
}
extern "C" __global__ void probe_recursion(int depth) {
    volatile int keep[1] = {};
    keep[0] = deep(depth, keep);
}
KERNEL(probe_recursion)

// Each block writes its part; blocks overlap if `step` is less than a part.
extern "C" __global__ void probe_overlap(unsigned* out, int step) { out[blockIdx.x * step + threadIdx.x] = blockIdx.x; }
KERNEL(probe_overlap)

extern "C" __global__ void probe_count(unsigned* counter) { atomicAdd(counter, 1u); }
KERNEL(probe_count)

// Threads write bytes `apart` from each other, and the first one a whole word where `word`.
extern "C" __global__ void probe_bytes(unsigned char* out, int apart, int word) {
    if (word && threadIdx.x == 0) *reinterpret_cast<unsigned*>(out) = 0;
    else out[threadIdx.x * apart] = static_cast<unsigned char>(threadIdx.x);
}
KERNEL(probe_bytes)

// All add to what one of them has set before, and has told them where `told`.
extern "C" __global__ void probe_count_from(unsigned* counter, int told) {
    if (threadIdx.x == 0) *counter = 7;
    if (told) __syncthreads();
    atomicAdd(counter, 1u);
}
KERNEL(probe_count_from)

// The first block hands the second a number, with a flag that is released and acquired or by atomics that order nothing.
extern "C" __global__ void probe_flag(unsigned* out, unsigned* flag, int relaxed) {
    if (blockIdx.x == 0) {
        out[0] = 5;
        if (relaxed) atomicExch(flag, 1u);
        else ptx::store_release(flag, 1);
    } else if (relaxed ? atomicAdd(flag, 0u) == 1 : ptx::load_acquire(flag) == 1) {
        out[1] = out[0];
    }
}
KERNEL(probe_flag)

// All blocks but the last read a number, which the last replaces; each is told of the one before, the first from `first` on.
extern "C" __global__ void probe_chain(unsigned* out, unsigned* flags, int first) {
    const unsigned block = blockIdx.x;
    if (int(block) > first && ptx::load_acquire(flags + block - 1) != 1) return;
    if (block == gridDim.x - 1) {
        if (threadIdx.x == 0) out[0] = 1;
        return;
    }
    out[1 + blockDim.x * block + threadIdx.x] = out[0];
    __syncthreads();
    if (threadIdx.x == 0 && int(block) >= first) ptx::store_release(flags + block, 1);
}
KERNEL(probe_chain)

// One thread writes sixteen bytes at once, the others read one of them each; then two write neighbouring places of them, or
// one place where `same`.
extern "C" __global__ void probe_widths(unsigned* out, int told, int same) {
    SHARED(Exchange, shared);
    uint4* wide = reinterpret_cast<uint4*>(shared.values);
    if (threadIdx.x == 0) *wide = make_uint4(1, 2, 3, 4);
    if (told) __syncthreads();
    if (threadIdx.x > 0) out[threadIdx.x] = reinterpret_cast<const unsigned char*>(wide)[threadIdx.x - 1];
    __syncthreads();
    if (threadIdx.x == 1) reinterpret_cast<unsigned short*>(wide)[1] = 5;
    if (threadIdx.x == 0) shared.values[same ? 0 : 1] = 6;
}
KERNEL(probe_widths)

// All warps read a number that one of the upper four replaces, which only these four have waited for.
extern "C" __global__ void probe_readers(unsigned* out) {
    SHARED(Exchange, shared);
    if (threadIdx.x == 0) shared.values[0] = 3;
    __syncthreads();
    out[threadIdx.x] = shared.values[0];
    if (threadIdx.x < 128) return;
    ptx::barrier_sync(1, 128);
    if (threadIdx.x == 128) shared.values[0] = 4;
}
KERNEL(probe_readers)
