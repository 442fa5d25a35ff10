// The driver's entry points about the device and its context: one device, ANABRANCH_EMU_CC its capability (9.0).
#include "errors.h"
#include "memory.h"
#include "worker.h"
#include <cstdio>
#include <cstdlib>
#include <cstring>

using namespace emulator;

namespace {

struct Capability {
    int major, minor;
};

Capability capability() {
    static const Capability value = [] {
        Capability c{9, 0};
        if (const char* text = getenv("ANABRANCH_EMU_CC"); text && *text && sscanf(text, "%d.%d", &c.major, &c.minor) != 2) {
            fprintf(stderr, "emulator: ANABRANCH_EMU_CC is \"%s\", expected a capability such as 9.0\n", text);
            exit(2);
        }
        return c;
    }();
    return value;
}

/// Shared memory that a block may ask for, by capability (CUDA programming guide, technical specifications).
int shared_per_block() {
    const Capability c = capability();
    if (c.major == 8) return (c.minor == 0 || c.minor == 7 ? 163 : 99) << 10;
    if (c.major == 12) return 99 << 10;
    return int(max_shared_bytes);
}

/// No device, as a driver says, where CUDA_VISIBLE_DEVICES is set to nothing.
int visible() {
    const char* devices = getenv("CUDA_VISIBLE_DEVICES");
    return devices && !*devices ? 0 : 1;
}

/// A launch that fills the multiprocessors and loops goes round more than once even at small sizes.
constexpr int multiprocessors = 4;

int attribute(int which) {
    switch (which) {
    case 1: return int(max_threads);                  // MAX_THREADS_PER_BLOCK
    case 2: case 3: return 1024;                      // MAX_BLOCK_DIM_X, Y
    case 4: return 64;                                // MAX_BLOCK_DIM_Z
    case 5: return 0x7fffffff;                        // MAX_GRID_DIM_X
    case 6: case 7: return 65535;                     // MAX_GRID_DIM_Y, Z
    case 8: return 48 << 10;                          // MAX_SHARED_MEMORY_PER_BLOCK
    case 9: return 64 << 10;                          // TOTAL_CONSTANT_MEMORY
    case 10: return int(warp_size);                   // WARP_SIZE
    case 11: return 0x7fffffff;                       // MAX_PITCH
    case 12: case 82: return 65536;                   // MAX_REGISTERS_PER_BLOCK, PER_MULTIPROCESSOR
    case 13: case 36: return 1000000;                 // CLOCK_RATE, MEMORY_CLOCK_RATE
    case 14: return 512;                              // TEXTURE_ALIGNMENT
    case 15: case 19: case 31: case 41: return 1;     // GPU_OVERLAP, CAN_MAP_HOST_MEMORY, CONCURRENT_KERNELS, UNIFIED_ADDRESSING
    case 16: return multiprocessors;                  // MULTIPROCESSOR_COUNT
    case 37: return 256;                              // GLOBAL_MEMORY_BUS_WIDTH
    case 38: return 4 << 20;                          // L2_CACHE_SIZE
    case 39: return 2048;                             // MAX_THREADS_PER_MULTIPROCESSOR
    case 40: return 1;                                // ASYNC_ENGINE_COUNT
    case 75: return capability().major;
    case 76: return capability().minor;
    case 81: return shared_per_block() + 1024;        // MAX_SHARED_MEMORY_PER_MULTIPROCESSOR
    case 97: return shared_per_block();               // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    case 106: return 32;                              // MAX_BLOCKS_PER_MULTIPROCESSOR
    case 111: return 1024;                            // RESERVED_SHARED_MEMORY_PER_BLOCK
    case 115: return 1;                               // MEMORY_POOLS_SUPPORTED
    default: return 0;                                // what it is not able to do
    }
}

int context_token;
thread_local void* current_context = nullptr;

} // namespace

extern "C" {

int cuInit(unsigned) { return visible() ? success : no_device; }
/// ANABRANCH_EMU_DRIVER, or 13.0.
int cuDriverGetVersion(int* version) {
    int major = 13, minor = 0;
    if (const char* text = getenv("ANABRANCH_EMU_DRIVER"); text && *text) sscanf(text, "%d.%d", &major, &minor);
    return *version = 1000 * major + 10 * minor, success;
}
int cuDeviceGetCount(int* count) { return *count = visible(), success; }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, ordinal == 0 ? success : invalid_device; }
int cuDeviceGetName(char* name, int bytes, int) { return snprintf(name, size_t(bytes), "CPU emulator"), success; }
int cuDeviceGetUuid_v2(unsigned char* uuid, int) { return memcpy(uuid, "anabranch-emulat", 16), success; }
int cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = total_memory(), success; }
int cuDeviceGetAttribute(int* value, int which, int) { return *value = attribute(which), success; }
int cuDeviceGetPCIBusId(char* text, int bytes, int) { return snprintf(text, size_t(bytes), "0000:00:00.0"), success; }

int cuDevicePrimaryCtxRetain(void** context, int) { return *context = &context_token, success; }
int cuDevicePrimaryCtxRelease_v2(int) { return success; }
int cuDevicePrimaryCtxSetFlags_v2(int, unsigned) { return success; }
int cuCtxSetCurrent(void* context) { return current_context = context, success; }
int cuCtxGetCurrent(void** context) { return *context = current_context, success; }
int cuCtxGetDevice(int* device) { return *device = 0, current_context ? success : invalid_context; }
int cuCtxSetFlags(unsigned) { return success; }
int cuCtxGetStreamPriorityRange(int* least, int* greatest) { return *least = *greatest = 0, success; }

int cuMemGetInfo_v2(size_t* free, size_t* total) {
    *free = free_memory();
    *total = total_memory();
    return success;
}
}
