// The wrappers of kernels/lib/ptx_sm90.cuh for the CPU. A twin promises no more than its PTX instruction does.
#pragma once
#include "ptx_twins.h"

namespace emulator {

void init_mbarrier(uint64_t* barrier, unsigned count, Site site);
void arrive_at_mbarrier(uint64_t* barrier, unsigned expected_bytes, Site site);
void wait_for_mbarrier(uint64_t* barrier, unsigned parity, Site site);
void fence_proxy(Site site);
/// `map` is what cuTensorMapEncodeTiled made, `place` the box's first element, innermost dimension first.
void copy_box(void* shared, const void* map, uint64_t* barrier, const int* place, unsigned rank, Site site);

/// The descriptor of a matrix in shared memory, for wgmma.
uint64_t describe_swizzled(const void* tile, unsigned block, Site site);
/// One `wgmma.mma_async` that adds to `d`, which has n / 2 floats; A is in `registers`, or where they are null in shared memory.
struct WarpgroupProduct {
    float* d;
    const uint32_t* registers;
    uint64_t a, b;
    int n;
    bool across;
};
void start_product(const WarpgroupProduct& product, Site site);
void fence_products(Site site);
void commit_products(Site site);
void wait_for_products(unsigned newest_pending, Site site);
/// setmaxnreg, of which only the meeting is emulated.
void set_registers(Site site);

} // namespace emulator

namespace ptx {

struct alignas(128) TensorMap {
    unsigned char opaque[128];
};

inline void mbarrier_init(uint64_t* barrier, unsigned count, EMULATOR_SITE) { emulator::init_mbarrier(barrier, count, site); }
inline void mbarrier_arrive(uint64_t* barrier, EMULATOR_SITE) { emulator::arrive_at_mbarrier(barrier, 0, site); }
inline void mbarrier_arrive_expect(uint64_t* barrier, unsigned bytes, EMULATOR_SITE) {
    emulator::arrive_at_mbarrier(barrier, bytes, site);
}
inline void mbarrier_wait(uint64_t* barrier, unsigned parity, EMULATOR_SITE) { emulator::wait_for_mbarrier(barrier, parity, site); }
inline void fence_proxy_async(EMULATOR_SITE) { emulator::fence_proxy(site); }
inline void copy_tile(void* shared, const TensorMap& map, uint64_t* barrier, int x, int y, EMULATOR_SITE) {
    const int place[] = {x, y};
    emulator::copy_box(shared, &map, barrier, place, 2, site);
}

inline uint64_t swizzled(const void* tile, unsigned block = 16, EMULATOR_SITE) { return emulator::describe_swizzled(tile, block, site); }
inline void wgmma_fence(EMULATOR_SITE) { emulator::fence_products(site); }
inline void wgmma_commit(EMULATOR_SITE) { emulator::commit_products(site); }
template <int newest_pending>
void wgmma_wait(EMULATOR_SITE) {
    emulator::wait_for_products(newest_pending, site);
}
template <int n, bool across>
void wgmma(float (&d)[n / 2], uint64_t a, uint64_t b, EMULATOR_SITE) {
    static_assert(n == 64 || n == 128 || n == 256);
    emulator::start_product({d, nullptr, a, b, n, across}, site);
}
template <int n, bool across>
void wgmma(float (&d)[n / 2], const uint32_t (&a)[4], uint64_t b, EMULATOR_SITE) {
    static_assert(n == 64 || n == 128);
    emulator::start_product({d, a, 0, b, n, across}, site);
}
template <int count>
void registers_release(EMULATOR_SITE) {
    static_assert(count % 8 == 0 && count >= 24 && count <= 256);
    emulator::set_registers(site);
}
template <int count>
void registers_claim(EMULATOR_SITE) {
    static_assert(count % 8 == 0 && count >= 24 && count <= 256);
    emulator::set_registers(site);
}

} // namespace ptx
