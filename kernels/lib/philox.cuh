// Philox4x32-10 as src/random.rs draws it, and dropout: an element is kept where its 24-bit number is at least `least`.
#pragma once
#include <cstdint>

/// What decides which elements dropout keeps, and 1 / (1 − p).
struct Dropout {
    unsigned key0, key1, step_low, step_high;
    unsigned least;
    float scale;
};

/// The four words at counter (lo `place`, hi step).
__device__ __forceinline__ uint4 philox(const Dropout& d, uint64_t place) {
    unsigned c0 = unsigned(place), c1 = unsigned(place >> 32), c2 = d.step_low, c3 = d.step_high;
    unsigned k0 = d.key0, k1 = d.key1;
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const unsigned high0 = __umulhi(0xd2511f53u, c0), low0 = 0xd2511f53u * c0;
        const unsigned high1 = __umulhi(0xcd9e8d57u, c2), low1 = 0xcd9e8d57u * c2;
        c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
        k0 += 0x9e3779b9u, k1 += 0xbb67ae85u;
    }
    return make_uint4(c0, c1, c2, c3);
}

__device__ __forceinline__ unsigned philox_word(const uint4& words, unsigned i) {
    return i < 2 ? (i == 0 ? words.x : words.y) : (i == 2 ? words.z : words.w);
}

/// Which of the `count` (at most 16) elements from place `first` on are kept, a bit each.
template <int count>
__device__ __forceinline__ unsigned kept(const Dropout& d, uint64_t first) {
    unsigned bits = 0;
    const unsigned skip = unsigned(first % 4);
#pragma unroll
    for (int block = 0; block < (count + 6) / 4; block++) {
        if (4 * block >= int(skip) + count) break;
        const uint4 words = philox(d, first / 4 + block);
#pragma unroll
        for (unsigned i = 0; i < 4; i++)
            bits |= unsigned(philox_word(words, i) >> 8 >= d.least) << (4 * block + i);
    }
    return bits >> skip & ((1u << count) - 1);
}
