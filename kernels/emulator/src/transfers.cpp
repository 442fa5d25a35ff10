// The driver's entry points for memory: allocation, copies, fills. Every device range must lie in one allocation.
#include "errors.h"
#include "memory.h"
#include <cstdlib>
#include <cstring>

using namespace emulator;

namespace {

void* host(DevicePointer pointer) { return reinterpret_cast<void*>(pointer); }

Result check_range(const char* call, DevicePointer pointer, size_t bytes) {
    if (bytes == 0 || allocated(pointer, bytes)) return success;
    return report(invalid_value, std::string(call) + ": " + std::to_string(bytes) + " device bytes are not within one allocation");
}

Result copy(const char* call, void* to, const void* from, size_t bytes, bool to_device, bool from_device) {
    if (to_device)
        if (Result bad = check_range(call, DevicePointer(to), bytes)) return bad;
    if (from_device)
        if (Result bad = check_range(call, DevicePointer(from), bytes)) return bad;
    memmove(to, from, bytes);
    return success;
}

template <class T>
Result fill(const char* call, DevicePointer to, T value, size_t count) {
    if (Result bad = check_range(call, to, count * sizeof(T))) return bad;
    if (to % sizeof(T)) return report(invalid_value, std::string(call) + ": the pointer is not aligned to its element");
    auto* p = static_cast<T*>(host(to));
    for (size_t i = 0; i < count; i++) p[i] = value;
    return success;
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
    return *pointer ? success : out_of_memory;
}
int cuMemAllocAsync(DevicePointer* pointer, size_t bytes, void*) { return cuMemAlloc_v2(pointer, bytes); }
int cuMemFree_v2(DevicePointer pointer) { return free_device(pointer); }
int cuMemFreeAsync(DevicePointer pointer, void*) { return free_device(pointer); }

int cuMemHostAlloc(void** pointer, size_t bytes, unsigned) {
    *pointer = aligned_alloc(4096, (bytes + 4095) & ~size_t(4095));
    return *pointer ? success : out_of_memory;
}
int cuMemAllocHost_v2(void** pointer, size_t bytes) { return cuMemHostAlloc(pointer, bytes, 0); }
int cuMemFreeHost(void* pointer) { return free(pointer), success; }
int cuMemHostRegister_v2(void*, size_t, unsigned) { return success; }
int cuMemHostUnregister(void*) { return success; }

int cuMemcpyHtoD_v2(DevicePointer to, const void* from, size_t bytes) {
    return copy("cuMemcpyHtoD", host(to), from, bytes, true, false);
}
int cuMemcpyDtoH_v2(void* to, DevicePointer from, size_t bytes) {
    return copy("cuMemcpyDtoH", to, host(from), bytes, false, true);
}
int cuMemcpyDtoD_v2(DevicePointer to, DevicePointer from, size_t bytes) {
    return copy("cuMemcpyDtoD", host(to), host(from), bytes, true, true);
}
int cuMemcpyHtoDAsync_v2(DevicePointer to, const void* from, size_t bytes, void*) { return cuMemcpyHtoD_v2(to, from, bytes); }
int cuMemcpyDtoHAsync_v2(void* to, DevicePointer from, size_t bytes, void*) { return cuMemcpyDtoH_v2(to, from, bytes); }
int cuMemcpyDtoDAsync_v2(DevicePointer to, DevicePointer from, size_t bytes, void*) { return cuMemcpyDtoD_v2(to, from, bytes); }

int cuMemsetD8_v2(DevicePointer to, unsigned char value, size_t count) { return fill("cuMemsetD8", to, value, count); }
int cuMemsetD16_v2(DevicePointer to, unsigned short value, size_t count) { return fill("cuMemsetD16", to, value, count); }
int cuMemsetD32_v2(DevicePointer to, unsigned value, size_t count) { return fill("cuMemsetD32", to, value, count); }
int cuMemsetD8Async(DevicePointer to, unsigned char value, size_t count, void*) { return cuMemsetD8_v2(to, value, count); }
int cuMemsetD16Async(DevicePointer to, unsigned short value, size_t count, void*) { return cuMemsetD16_v2(to, value, count); }
int cuMemsetD32Async(DevicePointer to, unsigned value, size_t count, void*) { return cuMemsetD32_v2(to, value, count); }
}
