// Tensor maps of bf16 matrices, for launches of kernels that copy tiles.
#pragma once
#include "device.h"

extern "C" int cuTensorMapEncodeTiled(void* map, int type, unsigned rank, void* base, const uint64_t* size, const uint64_t* stride,
                                      const uint32_t* box, const uint32_t* step, int interleave, int swizzle, int promotion, int fill);

namespace device {

struct alignas(128) TensorMap {
    unsigned char opaque[128];
};

/// The result code of making a map of `matrix[rows, columns]` in rows of `ld` that copies boxes of 128-byte rows.
inline int encode(TensorMap& map, unsigned long long matrix, uint64_t rows, uint64_t columns, uint64_t ld, uint32_t box_rows, uint32_t box_columns = 64) {
    constexpr int bf16 = 9, swizzle_128 = 3;
    const uint64_t size[] = {columns, rows}, stride[] = {2 * ld};
    const uint32_t box[] = {box_columns, box_rows}, step[] = {1, 1};
    return cuTensorMapEncodeTiled(&map, bf16, 2, reinterpret_cast<void*>(matrix), size, stride, box, step, 0, swizzle_128, 0, 0);
}
inline TensorMap tensor_map(unsigned long long matrix, uint64_t rows, uint64_t columns, uint64_t ld, uint32_t box_rows) {
    TensorMap map;
    check(!encode(map, matrix, rows, columns, ld, box_rows), "tensor map");
    return map;
}

} // namespace device
