// The driver's functions that the tests call, and short ways to call them.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

extern "C" {
int cuInit(unsigned);
int cuModuleLoadData(void**, const void*);
int cuModuleGetFunction(void**, void*, const char*);
int cuModuleGetGlobal_v2(unsigned long long*, size_t*, void*, const char*);
int cuFuncSetAttribute(void*, int, int);
int cuFuncGetParamInfo(void*, size_t, size_t*, size_t*);
int cuMemAlloc_v2(unsigned long long*, size_t);
int cuMemFree_v2(unsigned long long);
int cuMemcpyHtoD_v2(unsigned long long, const void*, size_t);
int cuMemcpyDtoH_v2(void*, unsigned long long, size_t);
int cuLaunchKernel(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);
int cuCtxSynchronize();
int cuStreamCreate(void**, unsigned);
int cuStreamDestroy_v2(void*);
int cuStreamSynchronize(void*);
int cuStreamWaitEvent(void*, void*, unsigned);
int cuEventCreate(void**, unsigned);
int cuEventRecord(void*, void*);
int cuEventSynchronize(void*);
int cuEventDestroy_v2(void*);
int cuMemHostAlloc(void**, size_t, unsigned);
int cuMemFreeHost(void*);
int cuMemcpyHtoDAsync_v2(unsigned long long, const void*, size_t, void*);
int cuMemcpyDtoHAsync_v2(void*, unsigned long long, size_t, void*);
const char* emulator_last_error();
int emulator_configure(const char* order, const char* async, uint64_t seed);
}

namespace device {

inline void check(bool good, const char* what) {
    if (good) return;
    printf("FAILED %s (%s)\n", what, emulator_last_error());
    exit(1);
}

/// A device array with the values of a host vector.
template <class T>
struct Array {
    unsigned long long pointer = 0;
    size_t count;
    explicit Array(const std::vector<T>& values) : Array(values.size()) {
        check(!cuMemcpyHtoD_v2(pointer, values.data(), count * sizeof(T)), "copy to the device");
    }
    explicit Array(size_t count) : count(count) { check(!cuMemAlloc_v2(&pointer, count * sizeof(T)), "allocation"); }
    Array(const Array&) = delete;
    ~Array() { cuMemFree_v2(pointer); }
    std::vector<T> read() const {
        std::vector<T> values(count);
        check(!cuMemcpyDtoH_v2(values.data(), pointer, count * sizeof(T)), "copy to the host");
        return values;
    }
};

/// As many bytes of shared memory as the kernel's struct has.
constexpr unsigned own_struct = ~0u;

/// Of a launch; one without a stream is waited for.
struct Shape {
    unsigned grid_x, grid_y, threads, shared_bytes;
    void* stream = nullptr;
    unsigned grid_z = 1;
};

template <class T>
auto argument(const Array<T>& array) { return array.pointer; }
template <class T>
T argument(const T& value) { return value; }

/// Launches after comparing the arguments' number and sizes; the driver's result code.
template <class... Arguments>
int launch(const char* name, Shape shape, const Arguments&... arguments) {
    static void* module = [] {
        void* loaded = nullptr;
        check(!cuInit(0) && !cuModuleLoadData(&loaded, "any"), "load");
        return loaded;
    }();
    void* function = nullptr;
    check(!cuModuleGetFunction(&function, module, name), name);
    auto values = std::make_tuple(argument(arguments)...);
    return std::apply(
        [&, stream = shape.stream](auto&... value) {
            void* pointers[] = {&value...};
            const size_t sizes[] = {sizeof(value)...}, count = sizeof...(value);
            size_t offset, size;
            for (size_t i = 0; i < count; i++)
                check(!cuFuncGetParamInfo(function, i, &offset, &size) && size == sizes[i], "an argument's size");
            check(cuFuncGetParamInfo(function, count, &offset, &size) != 0, "the number of arguments");
            unsigned shared = shape.shared_bytes;
            unsigned long long variable;
            if (shared == own_struct)
                check(!cuModuleGetGlobal_v2(&variable, &size, module, (std::string(name) + "_shared_bytes").c_str()) &&
                          !cuMemcpyDtoH_v2(&shared, variable, sizeof shared), "a kernel's shared memory");
            if (shared > 48 << 10) cuFuncSetAttribute(function, 8, int(shared));
            const int result = cuLaunchKernel(function, shape.grid_x, shape.grid_y, shape.grid_z, shape.threads, 1, 1, shared, stream, pointers, nullptr);
            return result || stream ? result : cuStreamSynchronize(nullptr);
        },
        values);
}

} // namespace device
