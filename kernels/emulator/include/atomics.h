// Integer atomics, relaxed as in CUDA. Float atomics are missing on purpose: their sums depend on the order of arrival.
#pragma once
#include <type_traits>

namespace emulator {

/// Tells the race detector, if there is one.
void atomic_access(const void* p);

/// Replaces `*p` by `next(old)`; blocks of other launches may do the same at the same time.
template <class T, class Next>
__attribute__((no_sanitize("thread"))) T atomic_update(T* p, Next next) {
    static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "only 4 and 8-byte integers are atomic");
    atomic_access(p);
    T old = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(p, &old, next(old), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    return old;
}

} // namespace emulator

template <class T> T atomicAdd(T* p, T value) { return emulator::atomic_update(p, [=](T old) { return T(old + value); }); }
template <class T> T atomicSub(T* p, T value) { return emulator::atomic_update(p, [=](T old) { return T(old - value); }); }
template <class T> T atomicExch(T* p, T value) { return emulator::atomic_update(p, [=](T) { return value; }); }
template <class T> T atomicMin(T* p, T value) { return emulator::atomic_update(p, [=](T old) { return value < old ? value : old; }); }
template <class T> T atomicMax(T* p, T value) { return emulator::atomic_update(p, [=](T old) { return old < value ? value : old; }); }
template <class T> T atomicAnd(T* p, T value) { return emulator::atomic_update(p, [=](T old) { return T(old & value); }); }
template <class T> T atomicOr(T* p, T value) { return emulator::atomic_update(p, [=](T old) { return T(old | value); }); }
template <class T> T atomicXor(T* p, T value) { return emulator::atomic_update(p, [=](T old) { return T(old ^ value); }); }
template <class T> T atomicCAS(T* p, T compare, T value) {
    return emulator::atomic_update(p, [=](T old) { return old == compare ? value : old; });
}
