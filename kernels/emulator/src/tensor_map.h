// A matrix in global memory as the tensor memory accelerator knows it: the emulator's content of a CUtensorMap.
#pragma once
#include <cstddef>
#include <cstdint>

namespace emulator {

constexpr unsigned max_tensor_rank = 5;

struct TensorMap {
    uint64_t magic; // of a map that was encoded
    const unsigned char* base;
    uint32_t rank, element_bytes;
    /// Bits of the address of a 16-byte chunk that are exchanged, 0 to 3: for spans of 16, 32, 64 and 128 bytes.
    uint32_t swizzle;
    uint32_t box[max_tensor_rank];
    uint32_t size[max_tensor_rank];
    uint64_t stride[max_tensor_rank - 1]; // in bytes, of all dimensions but the innermost
    static constexpr uint64_t encoded = 0x70616d726f736e74;
};
static_assert(sizeof(TensorMap) <= 128, "a CUtensorMap");

/// Where a 16-byte chunk lies whose offset without permutation is `offset` (PTX ISA, "Swizzling modes").
inline size_t permuted(size_t offset, unsigned swizzle) {
    return offset ^ ((offset >> 7 & ((1u << swizzle) - 1)) << 4);
}

} // namespace emulator
