// The kernels and named device variables that are linked in.
#pragma once
#include "../include/emulator.h"

namespace emulator {

struct Global {
    const char* name;
    void* address;
    size_t bytes;
};

const Kernel* find_kernel(const char* name);
const Global* find_global(const char* name);
/// Whether `bytes` bytes at `pointer` belong to one device variable.
bool inside_global(const void* pointer, size_t bytes);

} // namespace emulator
