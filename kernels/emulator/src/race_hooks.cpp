// What g++ and clang++ call in code compiled with -fsanitize=thread. The sanitizer's own library is not linked.
#include <cstddef>

namespace emulator::race {
void access_from_code(const void* pointer, size_t bytes, bool write, const void* code);
}

#define HOOKS(kind, bytes)                                                                                             \
    void __tsan_##kind##read##bytes(void* p) {                                                                         \
        emulator::race::access_from_code(p, bytes, false, __builtin_return_address(0));                                \
    }                                                                                                                  \
    void __tsan_##kind##write##bytes(void* p) {                                                                        \
        emulator::race::access_from_code(p, bytes, true, __builtin_return_address(0));                                 \
    }
#define HOOKS_OF_SIZE(bytes) HOOKS(, bytes) HOOKS(unaligned_, bytes) HOOKS(volatile_, bytes) HOOKS(unaligned_volatile_, bytes)

extern "C" {
HOOKS_OF_SIZE(1)
HOOKS_OF_SIZE(2)
HOOKS_OF_SIZE(4)
HOOKS_OF_SIZE(8)
HOOKS_OF_SIZE(16)
void __tsan_read_range(void* p, size_t bytes) {
    emulator::race::access_from_code(p, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t bytes) {
    emulator::race::access_from_code(p, bytes, true, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
