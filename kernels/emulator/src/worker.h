// Everything one host thread needs to run blocks: the fibers with their stacks, the shared memory, who waits for what.
#pragma once
#include "../include/emulator.h"
#include "configuration.h"
#include "fiber.h"
#include <map>
#include <string>
#include <vector>

namespace emulator {

constexpr unsigned max_threads = 1024;
constexpr unsigned warp_size = 32;
constexpr unsigned max_warps = max_threads / warp_size;
constexpr size_t stack_bytes = 128 << 10;
constexpr unsigned max_shared_bytes = 232448; // 227 KiB, what a Hopper block may ask for
constexpr int named_barriers = 16;
constexpr unsigned max_mbarriers = 64;

enum class State : uint8_t { ready, running, at_barrier, in_collective, on_condition, exited };

/// A `cp.async` that its thread has not waited for.
struct Copy {
    unsigned char* shared;
    const unsigned char* global;
    unsigned bytes, source_bytes;
    uint64_t group;
    bool landed;
    Site site;
};

struct FiberThread : Thread {
    Fiber fiber;
    State state;
    Site waits_at;
    int waits_for_barrier;
    bool (*condition)(void*);
    std::string (*missing)(void*); // what the condition lacks, or null
    void* condition_argument;
    std::vector<Copy> copies; // oldest first
    uint64_t groups;          // committed so far; the open group has this number
};

/// A warp-wide instruction that some lanes of its mask have reached.
struct Rendezvous {
    unsigned mask, arrived;
    Collective kind;
    void* operands[warp_size];
    Site site;
};

/// A warp's part of a wgmma that was issued and has not run.
struct WarpProduct {
    float* d[warp_size];
    uint32_t registers[warp_size][4];
    bool from_registers;
    uint64_t a, b;
    int n;
    bool across;
    uint64_t group;
};

struct Warp {
    unsigned ready; // lanes that can run
    std::vector<Rendezvous> pending;
    std::vector<WarpProduct> products; // oldest first
    uint64_t groups, waited;           // of products: committed so far, and of these waited for
    bool open;                         // whether a product was issued after the last commit
    bool fenced;                       // whether products may be issued
};

/// A barrier in shared memory that counts arrivals and bytes.
struct Mbarrier {
    unsigned offset, number, count, pending;
    int64_t bytes;  // expected and not there yet
    uint64_t phase; // how many have ended
    unsigned made_by;
    bool fenced;  // whether copies may complete on it
    char past[2]; // what the race detector knows those by who arrived, by parity of the phase
};

/// A copy of the tensor memory accelerator that has not landed.
struct BulkCopy {
    unsigned char* shared;
    unsigned char map[128];
    Mbarrier* barrier;
    int place[5];
    Site site;
};

struct Barrier {
    int arrived, expected;
    Site site;
};

struct Worker {
    FiberThread threads[max_threads];
    Warp warps[max_warps];
    Barrier barriers[named_barriers];
    std::map<unsigned, Mbarrier> mbarriers; // by offset
    std::vector<BulkCopy> bulk_copies;      // oldest first
    unsigned thread_count, warp_count, alive, on_condition, last_warp;
    Configuration configuration;
    uint64_t random_state;
    const Kernel* kernel;
    void** arguments;
    unsigned char* stacks;
    unsigned char* shared;
    Fiber host;        // the launching host thread while fibers run
    Fiber abandoned;   // where a fiber that is never resumed leaves its place
    std::string error; // empty while the launch goes well

    Worker();
    ~Worker();
    Worker(const Worker&) = delete;
    uint64_t random();
    FiberThread& self() { return *static_cast<FiberThread*>(current); }
    void make_ready(FiberThread& thread);
    /// Runs other threads until the current one, whose state the caller has set, is ready again.
    void leave();
    /// Lets the current thread stay, or under an order other than ascending, puts it behind others.
    void may_leave();
    /// Lets one copy in flight land, if there is one.
    bool land_bulk_copy();
    /// Runs one block to its end; false with `error` set if it failed.
    bool run_block(Index block);
    /// Back to the host thread, for good.
    [[noreturn]] void stop();
};

/// The worker of the launch that runs on this host thread.
extern __thread Worker* worker;

/// `file.cu:12` of a site.
std::string text(Site site);

} // namespace emulator
