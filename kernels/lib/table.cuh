// Tables of a launch over many tensors: entries in the order of the blocks that work on them.
#pragma once
#include <cstdint>

/// The last of `count` entries whose `first` block is not past `block`; entry 0 begins at block 0.
template <class Entry>
__device__ __forceinline__ const Entry& entry_of(const Entry* table, int count, unsigned block) {
    int low = 0, high = count;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (table[middle].first <= block) low = middle;
        else high = middle;
    }
    return table[low];
}
