// A kernel that touches memory outside the process ends its launch with an error, not the process.
#pragma once
#include <csignal>
#include <memory>

namespace emulator {

/// While it lives, the calling host thread has a stack for signal handlers and the process a handler for SIGSEGV,
/// SIGBUS and SIGFPE that turns a kernel's fault into `fail`; faults elsewhere go where they went before.
class FaultHandler {
public:
    FaultHandler();
    ~FaultHandler();

private:
    std::unique_ptr<unsigned char[]> stack;
    stack_t before; // that of the thread
};

} // namespace emulator
