// scatter: dst[x, j, :] = src[x, from[j], :], zero where from[j] is 0xffffffff; for each part of a table
//
// A block moves 2,048 units of one part, a thread every 256th of them; the parts' blocks follow one another, so that the
// grid is a line of all of them. A unit is 16, 8, 4, 2 or 1 bytes: it divides an item, and both tensors of the part start
// at a multiple of it. A part has fewer than 2^32 units. Nothing rounds.
#include "kernel.cuh"
#include "table.cuh"

struct Part {
    uint64_t dst, src, from;         // bytes, bytes, elements from the start of each
    uint32_t first;                  // block
    uint32_t places, kept;           // j of dst, of src
    uint32_t units;                  // of an item
    uint32_t total;                  // units of dst
    uint32_t unit;                   // bytes
};

template <class Unit>
__device__ __forceinline__ void move(unsigned char* dst, const unsigned char* src, const uint32_t* from,
                                     const Part& part, const Unit& zero) {
    const uint64_t begin = uint64_t(blockIdx.x - part.first) * 2048 + threadIdx.x;
#pragma unroll 4
    for (int k = 0; k < 8; k++) {
        const uint64_t at = begin + 256 * k;
        if (at >= part.total) return;
        const uint32_t item = uint32_t(at) / part.units, unit = uint32_t(at) % part.units;
        const uint32_t x = item / part.places, place = from[item % part.places];
        Unit value = zero;
        if (place != 0xffffffffu)
            value = reinterpret_cast<const Unit*>(src)[(uint64_t(x) * part.kept + place) * part.units + unit];
        reinterpret_cast<Unit*>(dst)[at] = value;
    }
}

extern "C" __global__ void __launch_bounds__(256)
    scatter(unsigned char* dst, const unsigned char* src, const uint32_t* from, const Part* table, int parts) {
    const Part part = entry_of(table, parts, blockIdx.x);
    dst += part.dst;
    src += part.src;
    from += part.from;
    if (part.unit == 16) move(dst, src, from, part, make_uint4(0, 0, 0, 0));
    else if (part.unit == 8) move(dst, src, from, part, make_uint2(0, 0));
    else if (part.unit == 4) move(dst, src, from, part, 0u);
    else if (part.unit == 2) move(dst, src, from, part, uint16_t(0));
    else move(dst, src, from, part, static_cast<unsigned char>(0));
}
KERNEL(scatter)
