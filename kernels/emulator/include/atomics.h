// Integer atomics, relaxed as in CUDA: they order nothing, with __threadfence or without (ptx.cuh has load_acquire and
// store_release for that). Float atomics are missing on purpose: their sums depend on the order of arrival.
#pragma once
#include "emulator.h"
#include <type_traits>

namespace emulator {

/// These tell the race detector, if there is one.
void atomic_access(const void* p, size_t bytes, Site site);
void release_flag(const void* p);
void acquire_flag(const void* p);

/// Replaces `*p` by `next(old)`; blocks of other launches may do the same at the same time.
template <class T, class Next>
__attribute__((no_sanitize("thread"))) T atomic_update(T* p, Next next, Site site) {
    static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "only 4 and 8-byte integers are atomic");
    atomic_access(p, sizeof(T), site);
    T old = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(p, &old, next(old), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    return old;
}

} // namespace emulator

#define EMULATOR_ATOMIC(name, result)                                                                                  \
    template <class T>                                                                                                 \
    T atomic##name(T* p, T value, EMULATOR_SITE) {                                                                     \
        return emulator::atomic_update(p, [=]([[maybe_unused]] T old) { return T(result); }, site);                    \
    }
EMULATOR_ATOMIC(Add, old + value)
EMULATOR_ATOMIC(Sub, old - value)
EMULATOR_ATOMIC(Exch, value)
EMULATOR_ATOMIC(Min, value < old ? value : old)
EMULATOR_ATOMIC(Max, old < value ? value : old)
EMULATOR_ATOMIC(And, old & value)
EMULATOR_ATOMIC(Or, old | value)
EMULATOR_ATOMIC(Xor, old ^ value)
#undef EMULATOR_ATOMIC
template <class T>
T atomicCAS(T* p, T compare, T value, EMULATOR_SITE) {
    return emulator::atomic_update(p, [=](T old) { return old == compare ? value : old; }, site);
}
