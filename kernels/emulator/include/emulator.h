// What a kernel compiled for the CPU can see of the emulator: the running thread, its block, and the ways to wait.
//
// Every CUDA thread of a block is a fiber; all fibers of a block run on one host thread and change places only where
// a kernel waits (barriers, warp collectives, conditions), so plain loads and stores need no instrumentation.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace emulator {

struct Index {
    unsigned x, y, z;
};

/// The part of a thread that kernels read. `current` points to the running one, null outside a launch.
struct Thread {
    Index index;
    unsigned linear, lane, warp;
};
extern __thread Thread* current;

/// The running block.
struct Place {
    Index block, block_size, grid;
    unsigned char* shared;
    unsigned shared_bytes;
};
extern __thread Place place;

/// Where in a kernel a call stands; as a default argument it is filled in by the caller's line.
struct Site {
    const char* file;
    int line;
    static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};
#define EMULATOR_SITE ::emulator::Site site = {__builtin_FILE(), __builtin_LINE()}

/// Ends the launch: the text, with kernel, block and thread in front, becomes the launch's error.
[[noreturn]] void fail(Site site, const char* format, ...) __attribute__((format(printf, 2, 3)));

/// `__syncthreads`: every thread of the block, at one place of the kernel.
void block_barrier(Site site);
/// `bar.sync id, threads` and `bar.arrive id, threads`.
void named_barrier(int id, int threads, bool wait, Site site);
/// Waits until `ready(argument)`; nothing is assumed to be notified. `missing(argument)` tells what a deadlock lacks.
void wait_until(bool (*ready)(void*), void* argument, Site site, std::string (*missing)(void*));
/// Lets every other thread that can run go first.
void yield(Site site);

/// Warp-wide instructions. Lanes meet per mask and kind; the last one to arrive does the work of all.
enum class Collective : uint8_t {
    sync, shuffle, vote, reduce,
    // .aligned: the whole warp executes one and the same instruction
    ldmatrix, mma, wgmma, wgmma_fence, wgmma_commit, wgmma_wait, set_registers
};
using Meeting = void (*)(unsigned mask, void* const* operands);
void meet(unsigned mask, Collective kind, void* operands, Meeting work, Site site);

/// Checks that `bytes` at `pointer` lie in this launch's dynamic shared memory; returns the offset.
unsigned shared_offset(const void* pointer, size_t bytes, Site site);

/// A launchable kernel: its name and file, the function that unpacks the driver's argument pointers, and its parameters.
struct Kernel {
    const char* name;
    const char* file;
    void (*call)(void** arguments);
    unsigned parameters;
    const unsigned* sizes;
    const unsigned* alignments;
};
void register_kernel(const Kernel& kernel);
/// A named device variable, found by `cuModuleGetGlobal`.
void register_global(const char* name, void* address, size_t bytes);

} // namespace emulator
