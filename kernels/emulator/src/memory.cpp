// One map of allocations. A write past an end lands in a guard zone and is reported with the allocation's size and the
// offset; a write further away can only be found by a build with --asan.
#include "memory.h"
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace emulator {

namespace {

constexpr size_t alignment = 256;
/// NaN in every float type, so that reading a guard zone shows too, but not the NaN that fresh memory has.
struct GuardPattern {
    unsigned char bytes[guard_bytes + 1];
    GuardPattern() {
        for (size_t i = 0; i < sizeof bytes; i++) bytes[i] = i % 2 ? 0xff : 0xfe;
    }
};

struct Allocation {
    unsigned char* base; // what malloc gave
    size_t bytes;
};

std::mutex lock;
size_t used = 0;
std::map<DevicePointer, Allocation>& allocations() {
    static std::map<DevicePointer, Allocation> table;
    return table;
}

/// The guard_bytes bytes from `begin` on.
struct Guard {
    unsigned char* begin;
};

Guard before(DevicePointer pointer) {
    auto* p = reinterpret_cast<unsigned char*>(pointer);
    return {p - guard_bytes};
}
/// Starts at the first byte that was not asked for, so that even one element too many shows.
Guard after(DevicePointer pointer, size_t bytes) {
    return {reinterpret_cast<unsigned char*>(pointer) + bytes};
}

/// What a guard zone holds: the low byte of a NaN at even addresses, the high one at odd ones.
const unsigned char* contents(Guard guard) {
    static const GuardPattern pattern;
    return pattern.bytes + size_t(guard.begin) % 2;
}

void fill(Guard guard) { memcpy(guard.begin, contents(guard), guard_bytes); }

std::string check(Guard guard, DevicePointer pointer, size_t bytes) {
    const unsigned char* wanted = contents(guard);
    if (!memcmp(guard.begin, wanted, guard_bytes)) return "";
    size_t written = 0;
    while (guard.begin[written] == wanted[written]) written++;
    const auto at = reinterpret_cast<long long>(guard.begin + written) - (long long)pointer;
    fill(guard);
    return "a write outside an allocation of " + std::to_string(bytes) + " bytes, at byte " + std::to_string(at);
}

std::string check(DevicePointer pointer, const Allocation& allocation) {
    std::string error = check(before(pointer), pointer, allocation.bytes);
    return error.empty() ? check(after(pointer, allocation.bytes), pointer, allocation.bytes) : error;
}

} // namespace

size_t total_memory() {
    static const size_t bytes = [] {
        const char* value = getenv("ANABRANCH_EMU_MEMORY");
        return value && *value ? size_t(strtoull(value, nullptr, 10)) : size_t(8) << 30;
    }();
    return bytes;
}

size_t free_memory() {
    std::lock_guard<std::mutex> guard(lock);
    return total_memory() - used;
}

DevicePointer allocate(size_t bytes) {
    std::lock_guard<std::mutex> guard(lock);
    if (bytes > total_memory() - used) return 0;
    auto* base = static_cast<unsigned char*>(malloc(bytes + 2 * guard_bytes + alignment));
    if (!base) return 0;
    auto pointer = (DevicePointer(base) + guard_bytes + alignment - 1) & ~DevicePointer(alignment - 1);
    memset(reinterpret_cast<void*>(pointer), 0xff, bytes); // NaN in bf16, f32 and f64
    fill(before(pointer));
    fill(after(pointer, bytes));
    allocations()[pointer] = {base, bytes};
    used += bytes;
    return pointer;
}

std::string release(DevicePointer pointer) {
    std::lock_guard<std::mutex> guard(lock);
    auto found = allocations().find(pointer);
    if (found == allocations().end()) return "a pointer is freed that was not allocated, or twice";
    std::string error = check(pointer, found->second);
    used -= found->second.bytes;
    free(found->second.base);
    allocations().erase(found);
    return error;
}

bool allocated(DevicePointer pointer, size_t bytes) {
    std::lock_guard<std::mutex> guard(lock);
    auto next = allocations().upper_bound(pointer);
    if (next == allocations().begin()) return false;
    auto& [start, allocation] = *std::prev(next);
    return pointer - start <= allocation.bytes && bytes <= allocation.bytes - (pointer - start);
}

std::vector<Range> allocated_ranges() {
    std::lock_guard<std::mutex> guard(lock);
    std::vector<Range> ranges;
    for (auto& [pointer, allocation] : allocations()) ranges.push_back({pointer, allocation.bytes});
    return ranges;
}

std::string check_guards() {
    std::lock_guard<std::mutex> guard(lock);
    for (auto& [pointer, allocation] : allocations())
        if (std::string error = check(pointer, allocation); !error.empty()) return error;
    return "";
}

} // namespace emulator
