// Fiber switches: sixteen instructions on x86-64, ucontext elsewhere (or with -DEMULATOR_UCONTEXT, twenty times slower).
#include "fiber.h"

#if !defined(EMULATOR_FIBER_UCONTEXT)

// Saves the registers that a call preserves, changes stacks, restores. The jump instead of a return spares the
// processor's return predictor, which a change of stacks would mislead each time.
extern "C" void emulator_switch(void** save, void* to);
asm(R"(
.text
.hidden emulator_switch
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    pop %rcx
    jmp *%rcx
.size emulator_switch, . - emulator_switch
)");

namespace emulator {

void prepare(Fiber& fiber, unsigned char* bottom, size_t bytes, void (*entry)()) {
    auto* top = reinterpret_cast<void**>((size_t(bottom) + bytes) & ~size_t(15));
    *--top = nullptr; // the return address that `entry` would have, which also aligns its stack
    *--top = reinterpret_cast<void*>(entry);
    for (int saved = 0; saved < 6; saved++) *--top = nullptr;
    fiber.stack_pointer = top;
}

void switch_fiber(Fiber& from, Fiber& to) { emulator_switch(&from.stack_pointer, to.stack_pointer); }

} // namespace emulator

#else

namespace emulator {

void prepare(Fiber& fiber, unsigned char* bottom, size_t bytes, void (*entry)()) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = bottom;
    fiber.context.uc_stack.ss_size = bytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
}

void switch_fiber(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

} // namespace emulator

#endif
