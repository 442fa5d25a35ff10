// The PTX instructions of sm_90a alone, as in ptx.cuh: barriers in shared memory that count bytes (mbarrier), copies of tiles
// by the tensor memory accelerator, products by warpgroups (wgmma). Twins: kernels/emulator/include/ptx_sm90_twins.h.
//
//   mbarrier_init(barrier, count)      by one thread, then fence_proxy_async and a barrier before others use it; phase 0 begins
//   mbarrier_arrive(barrier)           one of `count`; a phase ends when all have arrived and all bytes that it expects are there
//   mbarrier_arrive_expect(barrier, bytes)   the same, after it expects so many bytes more
//   mbarrier_wait(barrier, parity)     until the phase of this parity has ended; parity 1 of a fresh barrier has
//   fence_proxy_async()                what this thread wrote in shared memory is for copies and wgmma from here on
//   copy_tile(shared, map, barrier, x, y)   box of the map from column x, row y on; what lies outside of the matrix, before
//                                      it too, is zero. Counts the box's bytes on the barrier. Shared: multiple of 128 bytes
//   swizzled(tile, block)              the descriptor of an operand in rows of 128 bytes as copy_tile leaves them, 16-byte chunks
//                                      permuted by address: k along the row, a row a line; or, `across`, 64 lines along the row
//                                      and a row a k, the next 64 lines `block` bytes on. 16 k are 2 resp. 128 further
//   wgmma<n, across>(d, a, b)          d[64, n] += a · b by four warps, 16 rows each: bf16, f32 sums; a from a
//                                      descriptor of 64 rows or from registers that hold 16 × 16 as of mma_m16n8k16; `across` is of b.
//                                      d[4·j + i]: element i of C of columns 8j.. in fragments.cuh
//   wgmma_fence, wgmma_commit, wgmma_wait<N>   before the first product after registers were used; groups as of cp.async
//   registers_release<N>, registers_claim<N>   setmaxnreg, of a warpgroup
#pragma once
#include "ptx.cuh"

#if defined(__CUDACC__)
namespace ptx {

/// What cuTensorMapEncodeTiled makes.
struct alignas(128) TensorMap {
    unsigned char opaque[128];
};

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, unsigned count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, unsigned parity) {
    asm volatile("{\n.reg .pred done;\nWAIT_%=:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra WAIT_%=;\n}"
                 ::"r"(shared_address(barrier)), "r"(parity) : "memory");
}
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void copy_tile(void* shared, const TensorMap& map, uint64_t* barrier, int x, int y) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
                 ::"r"(shared_address(shared)), "l"(&map), "r"(shared_address(barrier)), "r"(x), "r"(y) : "memory");
}

__device__ __forceinline__ uint64_t swizzled(const void* tile, unsigned block = 16) {
    return uint64_t((shared_address(tile) & 0x3ffff) >> 4) | uint64_t(block >> 4) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int newest_pending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(newest_pending) : "memory");
}

#define REGISTERS_32                                                                                                  \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "      \
    "%23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define SUMS_32(d)                                                                                                    \
    "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),       \
    "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),            \
    "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),           \
    "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define REGISTERS_64                                                                                                  \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "      \
    "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, "  \
    "%45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"
#define SUMS_64(d)                                                                                                    \
    "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),       \
    "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),            \
    "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),           \
    "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]),           \
    "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]),           \
    "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),           \
    "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),           \
    "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define REGISTERS_128                                                                                                 \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "      \
    "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, "  \
    "%45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, "  \
    "%67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, "  \
    "%89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, "   \
    "%109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, "    \
    "%127}"
#define SUMS_128(d)                                                                                                   \
    "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),       \
    "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),            \
    "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),           \
    "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]),           \
    "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]),           \
    "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),           \
    "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),           \
    "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]), "+f"(d[64]),           \
    "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]), "+f"(d[72]),           \
    "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), "+f"(d[80]),           \
    "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), "+f"(d[88]),           \
    "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]), "+f"(d[96]),           \
    "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]), "+f"(d[104]),      \
    "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]), "+f"(d[112]),   \
    "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]), "+f"(d[120]),   \
    "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])

template <int n, bool across>
__device__ __forceinline__ void wgmma(float (&d)[n / 2], uint64_t a, uint64_t b) {
    static_assert(n == 64 || n == 128 || n == 256);
#define WGMMA(n, sums, i, j, k)                                                                                       \
    asm volatile("{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\n"                                                       \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 " REGISTERS_##sums ", %" #i ", %" #j       \
                 ", add, 1, 1, 0, %" #k ";\n}"                                                                        \
                 : SUMS_##sums(d) : "l"(a), "l"(b), "n"(int(across)))
    if constexpr (n == 64) WGMMA(64, 32, 32, 33, 34);
    if constexpr (n == 128) WGMMA(128, 64, 64, 65, 66);
    if constexpr (n == 256) WGMMA(256, 128, 128, 129, 130);
#undef WGMMA
}

template <int n, bool across>
__device__ __forceinline__ void wgmma(float (&d)[n / 2], const uint32_t (&a)[4], uint64_t b) {
    static_assert(n == 64 || n == 128);
#define WGMMA(n, sums, i0, i1, i2, i3, j, k)                                                                          \
    asm volatile("{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\n"                                                       \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 " REGISTERS_##sums                         \
                 ", {%" #i0 ", %" #i1 ", %" #i2 ", %" #i3 "}, %" #j ", add, 1, 1, %" #k ";\n}"                        \
                 : SUMS_##sums(d) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int(across)))
    if constexpr (n == 64) WGMMA(64, 32, 32, 33, 34, 35, 36, 37);
    if constexpr (n == 128) WGMMA(128, 64, 64, 65, 66, 67, 68, 69);
#undef WGMMA
}

#undef SUMS_32
#undef SUMS_64
#undef SUMS_128
#undef REGISTERS_32
#undef REGISTERS_64
#undef REGISTERS_128

template <int count>
__device__ __forceinline__ void registers_release() {
    static_assert(count % 8 == 0 && count >= 24 && count <= 256);
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
__device__ __forceinline__ void registers_claim() {
    static_assert(count % 8 == 0 && count >= 24 && count <= 256);
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

} // namespace ptx
#else
#include <ptx_sm90_twins.h>
#endif
