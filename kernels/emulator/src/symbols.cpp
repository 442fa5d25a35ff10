// Asks addr2line, which is installed wherever a compiler is.
#include "symbols.h"
#include <cstdio>
#include <cstring>
#include <dlfcn.h>

namespace emulator {

namespace {

Dl_info library(const void* address) {
    Dl_info info = {};
    dladdr(address, &info);
    return info;
}

} // namespace

uint32_t library_offset(const void* address) {
    static const auto* base = static_cast<const char*>(library(reinterpret_cast<const void*>(&library_offset)).dli_fbase);
    return uint32_t(static_cast<const char*>(address) - base);
}

std::string source_lines(uint32_t offset) {
    char command[4600];
    const char* path = library(reinterpret_cast<const void*>(&library_offset)).dli_fname;
    snprintf(command, sizeof command, "addr2line -i -e '%.4096s' 0x%x 2>/dev/null", path, offset);
    std::string lines;
    if (FILE* pipe = popen(command, "r")) {
        for (char line[4096]; fgets(line, sizeof line, pipe);) {
            line[strcspn(line, " \n")] = 0;
            if (strstr(line, "/emulator/include/") || strstr(line, "wrapper.cpp") || line[0] == '?') continue;
            const char* slash = strrchr(line, '/');
            lines += (lines.empty() ? "" : " in ") + std::string(slash ? slash + 1 : line);
        }
        pclose(pipe);
    }
    char hexadecimal[16];
    snprintf(hexadecimal, sizeof hexadecimal, "0x%x", offset);
    return lines.empty() ? hexadecimal : lines;
}

} // namespace emulator
