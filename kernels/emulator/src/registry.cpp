// Filled before main, when the registrations of the kernel files are constructed.
#include "registry.h"
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace emulator {

namespace {

std::vector<Kernel>& kernels() {
    static std::vector<Kernel> table;
    return table;
}
std::vector<Global>& globals() {
    static std::vector<Global> table;
    return table;
}

template <class Entry>
const Entry* find(const std::vector<Entry>& table, const char* name) {
    for (const Entry& entry : table)
        if (!strcmp(entry.name, name)) return &entry;
    return nullptr;
}

template <class Entry>
void add(std::vector<Entry>& table, const Entry& entry) {
    if (find(table, entry.name)) {
        fprintf(stderr, "emulator: two kernel files define %s\n", entry.name);
        abort();
    }
    table.push_back(entry);
}

} // namespace

void register_kernel(const Kernel& kernel) { add(kernels(), kernel); }
void register_global(const char* name, void* address, size_t bytes) { add(globals(), Global{name, address, bytes}); }
const Kernel* find_kernel(const char* name) { return find(kernels(), name); }
const Global* find_global(const char* name) { return find(globals(), name); }

bool inside_global(const void* pointer, size_t bytes) {
    for (const Global& global : globals()) {
        const size_t start = size_t(global.address), at = size_t(pointer);
        if (at >= start && at - start <= global.bytes && bytes <= global.bytes - (at - start)) return true;
    }
    return false;
}

} // namespace emulator
