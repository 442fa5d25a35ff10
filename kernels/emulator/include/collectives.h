// Barriers, shuffles, votes and reductions of CUDA C++. The work is done in src/collectives.cpp.
#pragma once
#include "emulator.h"
#include <cstring>

namespace emulator {

/// One lane's part in a shuffle: what it gives, which lane it reads (any lane of the mask), what it gets.
struct Shuffle {
    uint64_t give, get;
    unsigned source;
};
void shuffle(unsigned mask, Shuffle& part, Site site);
/// `__syncwarp`: of all these functions the only one that orders memory.
void warp_barrier(unsigned mask, Site site);
/// The lanes of the mask whose predicate holds.
unsigned ballot(unsigned mask, bool predicate, Site site);
enum class Reduction : uint8_t { add, min, max, bit_and, bit_or, bit_xor, min_signed, max_signed };
unsigned reduce(unsigned mask, Reduction kind, unsigned value, Site site);

template <class T>
T shuffle_from(unsigned mask, T value, unsigned source, Site site) {
    static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
    Shuffle part{0, 0, source};
    memcpy(&part.give, &value, sizeof value);
    shuffle(mask, part, site);
    memcpy(&value, &part.get, sizeof value);
    return value;
}

} // namespace emulator

inline void __syncthreads(EMULATOR_SITE) { emulator::block_barrier(site); }
inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATOR_SITE) { emulator::warp_barrier(mask, site); }
/// These order memory only together with an atomic, and to the race detector not even then: it knows load_acquire and
/// store_release.
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATOR_SITE) {
    unsigned lane = emulator::current->lane, first = lane & ~unsigned(width - 1);
    return emulator::shuffle_from(mask, value, first | (unsigned(source) & unsigned(width - 1)), site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32, EMULATOR_SITE) {
    unsigned lane = emulator::current->lane, source = lane ^ unsigned(flip), last = lane | unsigned(width - 1);
    return emulator::shuffle_from(mask, value, source > last ? lane : source, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_SITE) {
    unsigned lane = emulator::current->lane, source = lane + delta, last = lane | unsigned(width - 1);
    return emulator::shuffle_from(mask, value, source > last ? lane : source, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_SITE) {
    unsigned lane = emulator::current->lane, within = lane & unsigned(width - 1);
    return emulator::shuffle_from(mask, value, within < delta ? lane : lane - delta, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATOR_SITE) {
    return emulator::ballot(mask, predicate != 0, site);
}
inline int __any_sync(unsigned mask, int predicate, EMULATOR_SITE) {
    return emulator::ballot(mask, predicate != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, EMULATOR_SITE) {
    return emulator::ballot(mask, predicate != 0, site) == mask;
}

#define EMULATOR_REDUCE(name, T, kind)                                                                                 \
    inline T __reduce_##name##_sync(unsigned mask, T value, EMULATOR_SITE) {                                           \
        return T(emulator::reduce(mask, emulator::Reduction::kind, unsigned(value), site));                            \
    }
EMULATOR_REDUCE(add, unsigned, add)
EMULATOR_REDUCE(add, int, add)
EMULATOR_REDUCE(min, unsigned, min)
EMULATOR_REDUCE(min, int, min_signed)
EMULATOR_REDUCE(max, unsigned, max)
EMULATOR_REDUCE(max, int, max_signed)
EMULATOR_REDUCE(and, unsigned, bit_and)
EMULATOR_REDUCE(or, unsigned, bit_or)
EMULATOR_REDUCE(xor, unsigned, bit_xor)
#undef EMULATOR_REDUCE

