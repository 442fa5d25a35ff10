// The driver's entry points for memory: allocation, copies, fills. Every device range must lie in one allocation.
//
// An asynchronous copy from or to pinned host memory happens when its stream comes to it; one from pageable memory has
// read its source when the call returns, one to it has been done. A call without a stream first waits for the default one.
#include "errors.h"
#include "memory.h"
#include "registry.h"
#include "streams.h"
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

using namespace emulator;

namespace {

std::mutex pinned_lock;
std::map<size_t, size_t>& pinned_ranges() { // bytes by address
    static std::map<size_t, size_t> ranges;
    return ranges;
}

void pin(const void* pointer, size_t bytes) {
    std::lock_guard<std::mutex> guard(pinned_lock);
    pinned_ranges()[size_t(pointer)] = bytes;
}

void unpin(const void* pointer) {
    run_all();
    std::lock_guard<std::mutex> guard(pinned_lock);
    pinned_ranges().erase(size_t(pointer));
}

bool pinned(const void* pointer, size_t bytes) {
    std::lock_guard<std::mutex> guard(pinned_lock);
    auto next = pinned_ranges().upper_bound(size_t(pointer));
    if (next == pinned_ranges().begin()) return false;
    auto [start, size] = *std::prev(next);
    return size_t(pointer) + bytes <= start + size;
}

void* host(DevicePointer pointer) { return reinterpret_cast<void*>(pointer); }

Result check_range(const char* call, DevicePointer pointer, size_t bytes) {
    if (bytes == 0 || allocated(pointer, bytes) || inside_global(host(pointer), bytes)) return success;
    return report(invalid_value, std::string(call) + ": " + std::to_string(bytes) + " device bytes are not within one allocation");
}

enum class Direction { to_device, to_host, on_device };

struct Transfer {
    const char* call;
    void* to;
    const void* from;
    size_t bytes;
    Direction direction;

    Result check() const {
        Result bad = success;
        if (direction != Direction::to_host) bad = check_range(call, DevicePointer(to), bytes);
        if (direction != Direction::to_device && !bad) bad = check_range(call, DevicePointer(from), bytes);
        return bad;
    }
    /// Checks again: the memory may have been freed since the call.
    Result run() const {
        if (Result bad = check()) return bad;
        memmove(to, from, bytes);
        return success;
    }
};

Result now(const Transfer& transfer) {
    if (Result bad = transfer.check()) return bad;
    if (Result bad = finish(nullptr)) return bad;
    return transfer.run();
}

Result in_turn(const Transfer& transfer, void* stream) {
    if (Result bad = transfer.check()) return bad;
    if (transfer.direction == Direction::to_device && deferred() && !pinned(transfer.from, transfer.bytes)) {
        const auto* from = static_cast<const char*>(transfer.from);
        return in_stream(stream, [transfer, copy = std::string(from, transfer.bytes)] {
            Transfer later = transfer;
            later.from = copy.data();
            return later.run();
        });
    }
    if (transfer.direction == Direction::to_host && !pinned(transfer.to, transfer.bytes)) {
        if (Result bad = finish(stream)) return bad;
        return transfer.run();
    }
    return in_stream(stream, [transfer] { return transfer.run(); });
}

template <class T>
Result fill(const char* call, DevicePointer to, T value, size_t count, void* stream) {
    if (to % sizeof(T)) return report(invalid_value, std::string(call) + ": the pointer is not aligned to its element");
    if (Result bad = check_range(call, to, count * sizeof(T))) return bad;
    return in_stream(stream, [=] {
        if (Result bad = check_range(call, to, count * sizeof(T))) return bad;
        auto* p = static_cast<T*>(host(to));
        for (size_t i = 0; i < count; i++) p[i] = value;
        return success;
    });
}

Result free_device(DevicePointer pointer) {
    if (!pointer) return success;
    std::string error = release(pointer);
    return error.empty() ? success : report(illegal_address, "free: " + error);
}

} // namespace

extern "C" {

int cuMemAlloc_v2(DevicePointer* pointer, size_t bytes) {
    if (!bytes) return report(invalid_value, "an allocation of no bytes");
    *pointer = allocate(bytes);
    if (*pointer) return success;
    run_all(); // memory may be freed in a stream
    *pointer = allocate(bytes);
    return *pointer ? success : out_of_memory;
}
int cuMemAllocAsync(DevicePointer* pointer, size_t bytes, void*) { return cuMemAlloc_v2(pointer, bytes); }

int cuMemFree_v2(DevicePointer pointer) {
    run_all(); // as the driver does
    return free_device(pointer);
}
int cuMemFreeAsync(DevicePointer pointer, void* stream) {
    return in_stream(stream, [=] { return free_device(pointer); });
}

int cuMemHostAlloc(void** pointer, size_t bytes, unsigned) {
    *pointer = aligned_alloc(4096, (bytes + 4095) & ~size_t(4095));
    if (!*pointer) return out_of_memory;
    pin(*pointer, bytes);
    return success;
}
int cuMemAllocHost_v2(void** pointer, size_t bytes) { return cuMemHostAlloc(pointer, bytes, 0); }
int cuMemFreeHost(void* pointer) {
    unpin(pointer);
    return free(pointer), success;
}
int cuMemHostRegister_v2(void* pointer, size_t bytes, unsigned) { return pin(pointer, bytes), success; }
int cuMemHostUnregister(void* pointer) { return unpin(pointer), success; }

int cuMemcpyHtoD_v2(DevicePointer to, const void* from, size_t bytes) {
    return now({"cuMemcpyHtoD", host(to), from, bytes, Direction::to_device});
}
int cuMemcpyDtoH_v2(void* to, DevicePointer from, size_t bytes) {
    return now({"cuMemcpyDtoH", to, host(from), bytes, Direction::to_host});
}
int cuMemcpyDtoD_v2(DevicePointer to, DevicePointer from, size_t bytes) {
    return now({"cuMemcpyDtoD", host(to), host(from), bytes, Direction::on_device});
}
int cuMemcpyHtoDAsync_v2(DevicePointer to, const void* from, size_t bytes, void* stream) {
    return in_turn({"cuMemcpyHtoDAsync", host(to), from, bytes, Direction::to_device}, stream);
}
int cuMemcpyDtoHAsync_v2(void* to, DevicePointer from, size_t bytes, void* stream) {
    return in_turn({"cuMemcpyDtoHAsync", to, host(from), bytes, Direction::to_host}, stream);
}
int cuMemcpyDtoDAsync_v2(DevicePointer to, DevicePointer from, size_t bytes, void* stream) {
    return in_turn({"cuMemcpyDtoDAsync", host(to), host(from), bytes, Direction::on_device}, stream);
}

int cuMemsetD8Async(DevicePointer to, unsigned char value, size_t count, void* stream) {
    return fill("cuMemsetD8", to, value, count, stream);
}
int cuMemsetD16Async(DevicePointer to, unsigned short value, size_t count, void* stream) {
    return fill("cuMemsetD16", to, value, count, stream);
}
int cuMemsetD32Async(DevicePointer to, unsigned value, size_t count, void* stream) {
    return fill("cuMemsetD32", to, value, count, stream);
}
int cuMemsetD8_v2(DevicePointer to, unsigned char value, size_t count) { return cuMemsetD8Async(to, value, count, nullptr); }
int cuMemsetD16_v2(DevicePointer to, unsigned short value, size_t count) { return cuMemsetD16Async(to, value, count, nullptr); }
int cuMemsetD32_v2(DevicePointer to, unsigned value, size_t count) { return cuMemsetD32Async(to, value, count, nullptr); }
}
