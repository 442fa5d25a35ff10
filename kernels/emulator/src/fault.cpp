// Signal handlers. A fiber's guard page faults too, so a stack overflow is reported the same way.
#include "fault.h"
#include "../include/emulator.h"
#include <csignal>
#include <cstdlib>
#include <mutex>

namespace emulator {

namespace {

constexpr int signals[] = {SIGSEGV, SIGBUS, SIGFPE};
struct sigaction before[64];

void handle(int signal, siginfo_t* info, void* context) {
    if (current) {
        if (signal == SIGFPE) fail({nullptr, 0}, "integer division by zero");
        fail({nullptr, 0}, "access to address %p, which is no memory", info->si_addr);
    }
    struct sigaction& old = before[signal];
    if (old.sa_flags & SA_SIGINFO) return old.sa_sigaction(signal, info, context);
    sigaction(signal, &old, nullptr); // default or ignored: the instruction faults again
}

void install() {
    for (int signal : signals) {
        struct sigaction action = {};
        action.sa_sigaction = handle;
        // The handler leaves by a switch of stacks, not by a return: the signal must not stay blocked.
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        sigaction(signal, &action, &before[signal]);
    }
}

} // namespace

FaultHandler::FaultHandler() {
    static std::once_flag once;
    std::call_once(once, install);
    stack_t old;
    sigaltstack(nullptr, &old);
    if (!(old.ss_flags & SS_DISABLE)) return;
    constexpr size_t bytes = 64 << 10;
    stack = std::make_unique<unsigned char[]>(bytes);
    stack_t mine = {};
    mine.ss_sp = stack.get();
    mine.ss_size = bytes;
    sigaltstack(&mine, nullptr);
}

FaultHandler::~FaultHandler() {
    if (!stack) return;
    stack_t none = {};
    none.ss_flags = SS_DISABLE;
    sigaltstack(&none, nullptr);
}

} // namespace emulator
