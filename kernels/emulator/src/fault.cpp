// Signal handlers. A fiber's guard page faults too, so a stack overflow is reported the same way.
#include "fault.h"
#include "../include/emulator.h"
#include <csignal>
#include <cstdlib>
#include <mutex>

namespace emulator {

namespace {

constexpr int signals[] = {SIGSEGV, SIGBUS, SIGFPE};
struct sigaction others[64];

void handle(int signal, siginfo_t* info, void* context) {
    if (current) {
        if (signal == SIGFPE) fail({nullptr, 0}, "integer division by zero");
        fail({nullptr, 0}, "access to address %p, which is no memory", info->si_addr);
    }
    struct sigaction& old = others[signal];
    if (old.sa_flags & SA_SIGINFO) return old.sa_sigaction(signal, info, context);
    sigaction(signal, &old, nullptr); // default or ignored: the instruction faults again
}

void install() {
    for (int signal : signals) {
        struct sigaction action = {};
        action.sa_sigaction = handle;
        // The handler leaves by a switch of stacks, not by a return: the signal must not stay blocked.
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        sigaction(signal, &action, &others[signal]);
    }
}

} // namespace

FaultHandler::FaultHandler() {
    static std::once_flag once;
    std::call_once(once, install);
    // A host thread's own stack for signals, where it has one, may be too small for what `fail` does: one that overflows is
    // entered anew from its top, by the handler of that very fault, without end.
    constexpr size_t bytes = 64 << 10;
    stack.reset(new unsigned char[bytes]);
    stack_t mine = {};
    mine.ss_sp = stack.get();
    mine.ss_size = bytes;
    sigaltstack(&mine, &before);
}

FaultHandler::~FaultHandler() { sigaltstack(&before, nullptr); }

} // namespace emulator
