// A fiber: a stack and a place to go on from. Switching costs a few nanoseconds on x86-64.
#pragma once
#include <cstddef>
#if !defined(__x86_64__) || defined(EMULATOR_UCONTEXT)
#define EMULATOR_FIBER_UCONTEXT
#include <ucontext.h>
#endif

namespace emulator {

struct Fiber {
#if !defined(EMULATOR_FIBER_UCONTEXT)
    void* stack_pointer = nullptr;
#else
    ucontext_t context;
#endif
};

/// Makes `fiber` start at `entry`, which must never return, on the stack `[bottom, bottom + bytes)`.
void prepare(Fiber& fiber, unsigned char* bottom, size_t bytes, void (*entry)());
/// Stores where the caller is in `from` and goes on in `to`.
void switch_fiber(Fiber& from, Fiber& to);

} // namespace emulator
