// linear_bwd: dx[t, i] = Σ_j Σ_o dy_j[t, o] W_j[o, i] + m[t, i] · scale · Σ_ρ u[t, ρ] A[ρ, i]
//
// One sum over K: first the ranks of all outputs' adapters side by side, u[T, ranks] and A[ranks, I], then each output's O.
// With dropout (`drops`) the sums are multiplied with the mask and 1 / (1 − p) between the two; place t · I + i.
// A block makes one tile of dx: gridDim.x = ⌈T / tile's rows⌉ · ⌈I / tile's columns⌉.
// All leading dimensions are multiples of 8; padding of inputs is never read, that of dx becomes zero up to the next
// multiple of 8. f32 sums, dx rounds once.
#include "kernel.cuh"
#include "philox.cuh"
#include "product.cuh"

using namespace product;

struct Gradient {
    const bf16* dy;
    const bf16* w;
    int width, ld;
};
struct Task {
    bf16* dx;
    const bf16* u;
    const bf16* a;
    int tokens, inner, ld_x, ld_w, ranks, ld_u, ld_a, outputs, drops;
    Dropout dropout;
    Gradient output[4];
};

template <class P>
struct Shared {
    union {
        typename P::Ring ring;
        bf16 tile[P::m * P::n];
    };
    unsigned short kept[P::m][P::n / 16];
};

template <class P>
__device__ __forceinline__ void linear_bwd_tile(const Task& task, Shared<P>& shared) {
    const Place at = raster(blockIdx.x, (task.tokens + P::m - 1) / P::m, (task.inner + P::n - 1) / P::n);
    const int row0 = at.down * P::m, column0 = at.across * P::n;
    const int adapters = (task.ranks + DEPTH - 1) / DEPTH; // tiles of k
    if (task.drops)
#pragma unroll 1
        for (int i = threadIdx.x; i < P::m * P::n / 16; i += P::threads) {
            const int row = i / (P::n / 16), chunk = i % (P::n / 16);
            shared.kept[row][chunk] =
                kept<16>(task.dropout, uint64_t(row0 + row) * unsigned(task.inner) + unsigned(column0 + 16 * chunk));
        }

    P product;
    product.clear();
    product.add(
        shared.ring,
        [&](int segment, typename P::CopyA& a, typename P::CopyB& b) {
            const int j = segment - (task.ranks > 0);
            if (j >= task.outputs) return 0;
            const bf16* left = j < 0 ? task.u : task.output[j].dy;
            const bf16* right = j < 0 ? task.a : task.output[j].w;
            const int k = j < 0 ? task.ranks : task.output[j].width;
            a.open({left}, j < 0 ? task.ld_u : task.output[j].ld, k,
                   [&](int line) { return row0 + line < task.tokens ? row0 + line : -1; });
            b.open(right, j < 0 ? task.ld_a : task.ld_w, k, column0, task.inner);
            return k;
        },
        Nothing(),
        [&](int tile, const typename P::A&) {
            if (!task.drops || tile != adapters) return;
            product.each([&](int row, int column, float& v0, float& v1) {
                const unsigned bits = shared.kept[row][column / 16] >> column % 16;
                v0 = bits & 1 ? v0 * task.dropout.scale : 0.0f;
                v1 = bits & 2 ? v1 * task.dropout.scale : 0.0f;
            });
        });
    __syncthreads(); // the ring is free
    product.each([&](int row, int column, float v0, float v1) {
        auto& held = *reinterpret_cast<__nv_bfloat162*>(shared.tile + place<P::n / 8>(row, column / 8) + column % 8);
        held = __floats2bfloat162_rn(v0, v1);
    });
    __syncthreads();
    store<P>(task.dx, shared.tile, row0, column0, task.tokens, task.inner, task.ld_x);
}

using Small = Product<64, 64, 2, 2, 4, true, false>;
using Square = Product<128, 128, 2, 2, 4, true, false>;
using Wide = Product<128, 256, 2, 4, 3, true, false>; // four stages and `kept` would be too much for 8.6

extern "C" __global__ void __launch_bounds__(128) linear_bwd_64(const __grid_constant__ Task task) {
    SHARED(Shared<Small>, shared);
    linear_bwd_tile<Small>(task, shared);
}
KERNEL(linear_bwd_64)
KERNEL_SHARED(linear_bwd_64, Shared<Small>)

extern "C" __global__ void __launch_bounds__(128, 2) linear_bwd_128(const __grid_constant__ Task task) {
    SHARED(Shared<Square>, shared);
    linear_bwd_tile<Square>(task, shared);
}
KERNEL(linear_bwd_128)
KERNEL_SHARED(linear_bwd_128, Shared<Square>)

extern "C" __global__ void __launch_bounds__(256, 1) linear_bwd_256(const __grid_constant__ Task task) {
    SHARED(Shared<Wide>, shared);
    linear_bwd_tile<Wide>(task, shared);
}
KERNEL(linear_bwd_256)
KERNEL_SHARED(linear_bwd_256, Shared<Wide>)
