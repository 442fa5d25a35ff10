// The driver's entry points for modules, functions and launches. Any image loads: the kernels are linked in.
#include "errors.h"
#include "launch.h"
#include "memory.h"
#include "registry.h"
#include "streams.h"
#include "worker.h"
#include <cstring>
#include <map>
#include <memory>

using namespace emulator;

extern "C" int cuDeviceGetAttribute(int* value, int which, int device);

namespace {

struct Function {
    const Kernel* kernel;
    int max_dynamic_shared = 48 << 10;
};

struct Module {
    std::map<std::string, std::unique_ptr<Function>> functions;
};

int shared_per_block() {
    int bytes = 0;
    cuDeviceGetAttribute(&bytes, 97, 0);
    return bytes;
}

/// The values behind the driver's argument pointers, which are the caller's only until the launch returns.
class Arguments {
public:
    Arguments(const Kernel& kernel, void** values) {
        size_t bytes = 0;
        for (unsigned i = 0; i < kernel.parameters; i++) bytes += padded(kernel.sizes[i]);
        storage.resize(bytes / sizeof(Chunk));
        auto* at = reinterpret_cast<unsigned char*>(storage.data());
        for (unsigned i = 0; i < kernel.parameters; at += padded(kernel.sizes[i++])) {
            memcpy(at, values[i], kernel.sizes[i]);
            offsets.push_back(size_t(at - reinterpret_cast<unsigned char*>(storage.data())));
        }
    }
    std::vector<void*> pointers() {
        std::vector<void*> result;
        for (size_t offset : offsets) result.push_back(reinterpret_cast<unsigned char*>(storage.data()) + offset);
        return result;
    }

private:
    struct alignas(128) Chunk { // the largest alignment of a parameter, a tensor map's
        unsigned char bytes[128];
    };
    static size_t padded(size_t bytes) { return (bytes + sizeof(Chunk) - 1) / sizeof(Chunk) * sizeof(Chunk); }
    std::vector<Chunk> storage;
    std::vector<size_t> offsets;
};

constexpr int attribute_max_threads = 0, attribute_max_dynamic_shared = 8, attribute_shared_carveout = 9;

std::string refuse(const Function& function, Index grid, Index block, unsigned shared_bytes) {
    if (!grid.x || !grid.y || !grid.z || !block.x || !block.y || !block.z) return "a dimension of the launch is 0";
    if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) return "the grid is larger than 2147483647 × 65535 × 65535";
    if (block.x > 1024 || block.y > 1024 || block.z > 64 || uint64_t(block.x) * block.y * block.z > max_threads)
        return "the block is larger than 1024 threads";
    if (shared_bytes > unsigned(function.max_dynamic_shared))
        return std::to_string(shared_bytes) + " bytes of shared memory, allowed are " + std::to_string(function.max_dynamic_shared) +
               " (cuFuncSetAttribute)";
    return "";
}

} // namespace

extern "C" {

int cuModuleLoadData(void** module, const void* image) {
    if (!image) return report(invalid_value, "no image to load");
    *module = new Module;
    return success;
}
int cuModuleLoadDataEx(void** module, const void* image, unsigned, int*, void**) { return cuModuleLoadData(module, image); }
int cuModuleUnload(void* module) {
    run_all();
    return delete static_cast<Module*>(module), success;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
    const Kernel* kernel = find_kernel(name);
    if (!kernel) return report(not_found, std::string("no kernel is called ") + name);
    auto& entry = static_cast<Module*>(module)->functions[name];
    if (!entry) entry.reset(new Function{kernel});
    *function = entry.get();
    return success;
}

int cuModuleGetGlobal_v2(DevicePointer* pointer, size_t* bytes, void*, const char* name) {
    const Global* global = find_global(name);
    if (!global) return not_found; // asked for every kernel, and many have none
    if (pointer) *pointer = DevicePointer(global->address);
    if (bytes) *bytes = global->bytes;
    return success;
}

int cuFuncGetName(const char** name, void* function) { return *name = static_cast<Function*>(function)->kernel->name, success; }

/// As the driver's: offset and size of parameter `index`, invalid_value past the last one.
int cuFuncGetParamInfo(void* function, size_t index, size_t* offset, size_t* size) {
    const Kernel& kernel = *static_cast<Function*>(function)->kernel;
    if (index >= kernel.parameters) return invalid_value;
    size_t at = 0;
    for (size_t i = 0;; i++) {
        at = (at + kernel.alignments[i] - 1) / kernel.alignments[i] * kernel.alignments[i];
        if (i == index) break;
        at += kernel.sizes[i];
    }
    *offset = at;
    if (size) *size = kernel.sizes[index];
    return success;
}

int cuFuncSetAttribute(void* function, int which, int value) {
    if (!function) return invalid_handle;
    if (which == attribute_shared_carveout) return success;
    if (which != attribute_max_dynamic_shared) return invalid_value;
    if (value < 0 || value > shared_per_block())
        return report(invalid_value, std::to_string(value) + " bytes of shared memory, a block can have " + std::to_string(shared_per_block()));
    static_cast<Function*>(function)->max_dynamic_shared = value;
    return success;
}

int cuFuncGetAttribute(int* value, int which, void* function) {
    if (!function) return invalid_handle;
    *value = which == attribute_max_threads          ? int(max_threads)
             : which == attribute_max_dynamic_shared ? static_cast<Function*>(function)->max_dynamic_shared
                                                     : 0;
    return success;
}
int cuFuncSetCacheConfig(void*, int) { return success; }

int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void*, int threads, size_t shared_bytes) {
    int by_threads = 2048 / (threads > 0 ? threads : 1), by_shared = shared_bytes ? int((size_t(shared_per_block()) + 1024) / (shared_bytes + 1024)) : 32;
    return *blocks = by_threads < by_shared ? by_threads : by_shared, success;
}

int cuLaunchKernel(void* handle, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                   unsigned block_z, unsigned shared_bytes, void* stream, void** arguments, void** extra) {
    if (!handle) return invalid_handle;
    const auto& function = *static_cast<Function*>(handle);
    const Index grid{grid_x, grid_y, grid_z}, block{block_x, block_y, block_z};
    const std::string name = function.kernel->name;
    if (extra) return report(not_supported, name + ": arguments in a buffer");
    if (std::string why = refuse(function, grid, block, shared_bytes); !why.empty()) return report(invalid_value, name + ": " + why);
    if (!arguments && function.kernel->parameters) return report(invalid_value, name + ": no arguments");
    return in_stream(stream, [=, &kernel = *function.kernel, values = Arguments(*function.kernel, arguments), how = configuration()]() mutable {
        if (std::string error = launch(kernel, grid, block, shared_bytes, values.pointers().data(), how); !error.empty())
            return report(launch_failed, error);
        if (std::string error = check_guards(); !error.empty()) return report(illegal_address, name + ": " + error);
        return success;
    });
}

int cuLaunchCooperativeKernel(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**) {
    return report(not_supported, "a launch whose blocks wait for each other");
}
}
