// Device memory: host memory with guard zones around each allocation and NaN in it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace emulator {

using DevicePointer = unsigned long long;
constexpr size_t guard_bytes = 4096; // on either side

/// What the device has (ANABRANCH_EMU_MEMORY bytes, else 8 GiB) and what of it is free.
size_t total_memory();
size_t free_memory();
/// 256-byte aligned, filled with 0xff; 0 if less than `bytes` are free.
DevicePointer allocate(size_t bytes);
/// The error text if the pointer is none of ours, or a guard zone was written; empty if all is well.
std::string release(DevicePointer pointer);
/// Whether `[pointer, pointer + bytes)` lies within one allocation.
bool allocated(DevicePointer pointer, size_t bytes);
struct Range {
    DevicePointer begin;
    size_t bytes;
};
/// Every allocation, ascending.
std::vector<Range> allocated_ranges();
/// Looks at every guard zone; the error text of the first that was written, which is then repaired.
std::string check_guards();

} // namespace emulator
