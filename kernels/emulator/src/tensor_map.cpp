// cuTensorMapEncodeTiled, with the driver's rules for what a map may be.
#include "tensor_map.h"
#include "errors.h"
#include <cstring>

using namespace emulator;

namespace {

constexpr unsigned most_in_box = 256;

/// Bytes of an element by CUtensorMapDataType.
unsigned bytes_of(int type) {
    constexpr unsigned bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
    return type >= 0 && type < 13 ? bytes[type] : 0;
}

std::string number(uint64_t n) { return std::to_string(n); }

std::string refuse(const void* map, unsigned element, unsigned rank, const void* base, const uint64_t* size, const uint64_t* stride,
                   const uint32_t* box, const uint32_t* step, int interleave, int swizzle) {
    if (size_t(map) % 64) return "the map's own address is not a multiple of 64";
    if (!element) return "no such type of elements";
    if (!rank || rank > max_tensor_rank) return "rank " + number(rank);
    if (size_t(base) % 16) return "the address is not a multiple of 16";
    if (interleave) return "interleaved layouts are not emulated";
    if (swizzle < 0 || swizzle > 3) return "swizzle mode " + std::to_string(swizzle) + " is not emulated";
    for (unsigned i = 0; i < rank; i++) {
        const std::string which = "dimension " + number(i);
        if (!size[i] || size[i] > uint64_t(1) << 32) return which + " has " + number(size[i]) + " elements";
        if (!box[i] || box[i] > most_in_box) return "the box has " + number(box[i]) + " elements of " + which + ", 1 to 256 are possible";
        if (step[i] != 1) return "element strides are not emulated";
        if (i + 1 < rank && (stride[i] % 16 || stride[i] >= uint64_t(1) << 40))
            return "a stride of " + number(stride[i]) + " bytes is not a multiple of 16 below 2^40";
    }
    const unsigned inner = box[0] * element, span = 16u << swizzle;
    if (inner % 16) return "rows of the box have " + number(inner) + " bytes, not a multiple of 16";
    if (swizzle && inner > span) return "rows of the box have " + number(inner) + " bytes, the swizzle is of " + number(span);
    return "";
}

} // namespace

extern "C" int cuTensorMapEncodeTiled(void* map, int type, unsigned rank, void* base, const uint64_t* size, const uint64_t* stride,
                                      const uint32_t* box, const uint32_t* step, int interleave, int swizzle, int, int) {
    const unsigned element = bytes_of(type);
    if (std::string why = refuse(map, element, rank, base, size, stride, box, step, interleave, swizzle); !why.empty())
        return report(invalid_value, "cuTensorMapEncodeTiled: " + why);
    TensorMap made = {};
    made.magic = TensorMap::encoded;
    made.base = static_cast<const unsigned char*>(base);
    made.rank = rank, made.element_bytes = element, made.swizzle = unsigned(swizzle);
    for (unsigned i = 0; i < rank; i++) {
        made.box[i] = box[i];
        made.size[i] = uint32_t(size[i] - 1) + 1u;
        if (i + 1 < rank) made.stride[i] = stride[i];
    }
    memset(map, 0, 128);
    memcpy(map, &made, sizeof made);
    return success;
}
