// The wrappers of kernels/lib/ptx.cuh for the CPU. A twin promises no more than its PTX instruction does.
#pragma once
#include "cuda_bf16.h"

namespace emulator {

void copy_async(void* shared, const void* global, unsigned bytes, unsigned source_bytes, Site site);
void commit_group(Site site);
void wait_group(unsigned newest_pending, Site site);
void wait_all(Site site);
/// `ldmatrix` of 1, 2 or 4 matrices.
void load_matrices(uint32_t* registers, const void* row, int matrices, bool transposed, Site site);
void mma_bf16_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, Site site);
void mma_tf32_m16n8k8(float* d, const uint32_t* a, const uint32_t* b, Site site);

} // namespace emulator

namespace ptx {

template <int bytes>
void copy_async(void* shared, const void* global, int source_bytes = bytes, EMULATOR_SITE) {
    static_assert(bytes == 4 || bytes == 8 || bytes == 16);
    emulator::copy_async(shared, global, bytes, unsigned(source_bytes), site);
}
inline void copy_async_commit(EMULATOR_SITE) { emulator::commit_group(site); }
template <int newest_pending>
void copy_async_wait(EMULATOR_SITE) {
    emulator::wait_group(newest_pending, site);
}
inline void copy_async_wait_all(EMULATOR_SITE) { emulator::wait_all(site); }

inline void ldmatrix_x1(uint32_t (&r)[1], const void* row, EMULATOR_SITE) { emulator::load_matrices(r, row, 1, false, site); }
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row, EMULATOR_SITE) { emulator::load_matrices(r, row, 2, false, site); }
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, EMULATOR_SITE) { emulator::load_matrices(r, row, 4, false, site); }
inline void ldmatrix_x1_trans(uint32_t (&r)[1], const void* row, EMULATOR_SITE) { emulator::load_matrices(r, row, 1, true, site); }
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row, EMULATOR_SITE) { emulator::load_matrices(r, row, 2, true, site); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, EMULATOR_SITE) { emulator::load_matrices(r, row, 4, true, site); }

inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, EMULATOR_SITE) {
    uint32_t b[2] = {b0, b1};
    emulator::mma_bf16_m16n8k16(d, a, b, site);
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, EMULATOR_SITE) {
    uint32_t b[2] = {b0, b1};
    emulator::mma_tf32_m16n8k8(d, a, b, site);
}
inline uint32_t to_tf32(float x) { return (__float_as_uint(x) + 0x1000u) & 0xffffe000u; }

inline void barrier_sync(int id, int threads, EMULATOR_SITE) { emulator::named_barrier(id, threads, true, site); }
inline void barrier_arrive(int id, int threads, EMULATOR_SITE) { emulator::named_barrier(id, threads, false, site); }
inline float exp2_approx(float x) { return exp2f(x); }
inline uint32_t load_acquire(const uint32_t* p, EMULATOR_SITE) {
    const uint32_t value = emulator::atomic_update(const_cast<uint32_t*>(p), [](uint32_t old) { return old; }, site);
    emulator::acquire_flag(p);
    return value;
}
inline void store_release(uint32_t* p, uint32_t value, EMULATOR_SITE) {
    emulator::release_flag(p);
    emulator::atomic_update(p, [=](uint32_t) { return value; }, site);
}
template <class T>
T load_once(const T* p) {
    static_assert(sizeof(T) == 16);
    return *p;
}

} // namespace ptx
