// Runs the threads of a block one at a time, in the chosen order, and reports a deadlock when none can go on.
#include "race.h"
#include "worker.h"
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <new>
#include <sys/mman.h>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace emulator {

__thread Thread* current;
__thread Place place;
__thread Worker* worker;

namespace {

constexpr size_t page = 4096;

unsigned char* map(size_t bytes) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    return static_cast<unsigned char*>(p);
}

/// What a thread must not leave behind: the registers and the memory that it goes to are another's by then.
void check_nothing_in_flight(Worker& w) {
    if (w.alive == 1 && !w.bulk_copies.empty()) fail(w.bulk_copies[0].site, "the block ends before this copy has landed");
    const Warp& warp = w.warps[current->warp];
    if (warp.open) fail({nullptr, 0}, "the warp ends with a wgmma that it never committed");
    if (warp.waited < warp.groups) fail({nullptr, 0}, "the warp ends without having waited for its last wgmma");
}

void thread_main() {
    Worker& w = *worker;
    w.kernel->call(w.arguments);
    check_nothing_in_flight(w);
    w.self().state = State::exited;
    if (--w.alive == 0) w.stop();
    w.leave();
    __builtin_unreachable();
}

void check_conditions(Worker& w) {
    for (unsigned i = 0; i < w.thread_count; i++) {
        FiberThread& thread = w.threads[i];
        if (thread.state == State::on_condition && thread.condition(thread.condition_argument)) {
            w.on_condition--;
            w.make_ready(thread);
        }
    }
}

FiberThread& take(Worker& w, unsigned warp, unsigned lane) {
    w.warps[warp].ready &= ~(1u << lane);
    w.last_warp = warp;
    return w.threads[warp * warp_size + lane];
}

unsigned lowest(unsigned lanes) { return unsigned(__builtin_ctz(lanes)); }
unsigned highest(unsigned lanes) { return 31 - unsigned(__builtin_clz(lanes)); }

/// The ready thread that the order puts first, or null. Ascending and descending go round the warps and leave one only
/// when none of its lanes can run; highest_warp goes back to the highest as soon as it can run.
FiberThread* next_ready(Worker& w) {
    const unsigned n = w.warp_count;
    switch (w.configuration.order) {
    case Order::ascending:
        for (unsigned i = 0; i < n; i++)
            if (unsigned warp = (w.last_warp + i) % n, lanes = w.warps[warp].ready; lanes) return &take(w, warp, lowest(lanes));
        return nullptr;
    case Order::descending:
        for (unsigned i = 0; i < n; i++)
            if (unsigned warp = (w.last_warp + n - i) % n, lanes = w.warps[warp].ready; lanes) return &take(w, warp, highest(lanes));
        return nullptr;
    case Order::random:
        for (unsigned i = 0, first = unsigned(w.random() % n); i < n; i++)
            if (unsigned warp = (first + i) % n, lanes = w.warps[warp].ready; lanes) {
                for (unsigned skip = unsigned(w.random() % unsigned(__builtin_popcount(lanes))); skip; skip--) lanes &= lanes - 1;
                return &take(w, warp, lowest(lanes));
            }
        return nullptr;
    case Order::highest_warp:
        for (unsigned warp = n; warp-- > 0;)
            if (unsigned lanes = w.warps[warp].ready; lanes) return &take(w, warp, highest(lanes));
        return nullptr;
    }
    return nullptr;
}

FiberThread* pick(Worker& w) {
    if (w.configuration.async == Async::random && !w.bulk_copies.empty() && w.random() % 4 == 0) w.land_bulk_copy();
    if (w.on_condition && w.configuration.order == Order::random && w.random() % 4 == 0) check_conditions(w);
    FiberThread* thread = next_ready(w);
    while (!thread && w.on_condition) {
        check_conditions(w);
        thread = next_ready(w);
        if (!thread && !w.land_bulk_copy()) break;
    }
    return thread;
}

const char* doing(State state) {
    switch (state) {
    case State::at_barrier: return "wait at a barrier";
    case State::in_collective: return "wait in a warp collective";
    case State::on_condition: return "wait on a condition";
    case State::exited: return "have exited";
    default: return "can run";
    }
}

/// Neighbouring threads that wait at one place are reported together.
[[noreturn]] void deadlock(Worker& w, Site site) {
    std::string report = "deadlock:";
    for (unsigned i = 0, groups = 0; i < w.thread_count && groups < 8; groups++) {
        const FiberThread& first = w.threads[i];
        unsigned end = i + 1;
        while (end < w.thread_count && w.threads[end].state == first.state && w.threads[end].waits_at.line == first.waits_at.line) end++;
        report += " threads " + std::to_string(i) + ".." + std::to_string(end - 1) + " " + doing(first.state);
        if (first.state != State::exited) report += " (" + text(first.waits_at) + ")";
        if (first.state == State::on_condition && first.missing) report += ", " + first.missing(first.condition_argument);
        report += ";";
        i = end;
    }
    report.pop_back();
    fail(site, "%s", report.c_str());
}

} // namespace

Worker::Worker() : stacks(map(stack_bytes * max_threads)), shared(map(max_shared_bytes)) {
    for (unsigned i = 0; i < max_threads; i++) mprotect(stacks + stack_bytes * i, page, PROT_NONE); // overflow faults
}

Worker::~Worker() {
    munmap(stacks, stack_bytes * max_threads);
    munmap(shared, max_shared_bytes);
}

uint64_t Worker::random() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state * 0x2545F4914F6CDD1DULL >> 16;
}

void Worker::make_ready(FiberThread& thread) {
    thread.state = State::ready;
    warps[thread.warp].ready |= 1u << thread.lane;
}

void Worker::leave() {
    FiberThread& me = self();
    FiberThread* next = pick(*this);
    if (!next) deadlock(*this, me.waits_at);
    next->state = State::running;
    if (next == &me) return;
    current = next;
    switch_fiber(me.fiber, next->fiber);
}

void Worker::may_leave() {
    if (configuration.order == Order::ascending) return;
    make_ready(self());
    leave();
}

void Worker::stop() {
    switch_fiber(abandoned, host);
    __builtin_unreachable();
}

bool Worker::run_block(Index block) {
    const Index size = place.block_size;
    place.block = block;
    thread_count = alive = size.x * size.y * size.z;
    warp_count = (thread_count + warp_size - 1) / warp_size;
    on_condition = last_warp = 0;
    random_state = (configuration.seed + 1) * 0x9E3779B97F4A7C15ULL + block.x * 7919ull + block.y * 104729ull + block.z + 1;
    memset(shared, 0xff, place.shared_bytes); // NaN in bf16, f32 and f64
    for (Warp& warp : warps) {
        warp.ready = 0, warp.groups = warp.waited = 0, warp.open = warp.fenced = false;
        warp.pending.clear();
        warp.products.clear();
    }
    for (Barrier& barrier : barriers) barrier = {};
    mbarriers.clear();
    bulk_copies.clear();
    race::start_block(thread_count, warp_count);
    for (unsigned i = 0; i < thread_count; i++) {
        FiberThread& thread = threads[i];
        thread.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
        thread.linear = i, thread.lane = i % warp_size, thread.warp = i / warp_size;
        thread.waits_at = {nullptr, 0};
        thread.copies.clear();
        thread.groups = 0;
        // Tops that differ by a few cache lines keep the hot frames of a block out of the same cache sets.
        unsigned char* bottom = stacks + stack_bytes * i + page;
        size_t bytes = stack_bytes - page - (i % 64) * 192;
#if defined(__SANITIZE_ADDRESS__)
        __asan_unpoison_memory_region(bottom, bytes); // an abandoned fiber never unwound its frames
#endif
        prepare(thread.fiber, bottom, bytes, thread_main);
        make_ready(thread);
    }
    FiberThread* first = pick(*this);
    first->state = State::running;
    current = first;
    switch_fiber(host, first->fiber);
    current = nullptr;
    return error.empty();
}

void wait_until(bool (*ready)(void*), void* argument, Site site, std::string (*missing)(void*)) {
    Worker& w = *worker;
    FiberThread& me = w.self();
    if (ready(argument)) return w.may_leave();
    me.state = State::on_condition;
    me.condition = ready;
    me.missing = missing;
    me.condition_argument = argument;
    me.waits_at = site;
    w.on_condition++;
    w.leave();
}

void yield(Site site) {
    Worker& w = *worker;
    FiberThread& me = w.self();
    me.state = State::on_condition;
    me.condition = [](void*) { return true; };
    me.missing = nullptr;
    me.waits_at = site;
    w.on_condition++;
    w.leave();
}

std::string text(Site site) {
    if (!site.file) return "start";
    const char* slash = strrchr(site.file, '/');
    return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

void fail(Site site, const char* format, ...) {
    char message[1024];
    va_list values;
    va_start(values, format);
    vsnprintf(message, sizeof message, format, values);
    va_end(values);
    const Index b = place.block, t = current->index;
    char where[128];
    snprintf(where, sizeof where, ": block (%u,%u,%u) thread (%u,%u,%u): ", b.x, b.y, b.z, t.x, t.y, t.z);
    worker->error = worker->kernel->name + std::string(where) + (site.file ? text(site) + ": " : "") + message;
    worker->stop();
}

unsigned shared_offset(const void* pointer, size_t bytes, Site site) {
    size_t offset = size_t(static_cast<const unsigned char*>(pointer) - place.shared);
    if (offset > max_shared_bytes) fail(site, "the pointer is not in dynamic shared memory");
    if (offset + bytes > place.shared_bytes)
        fail(site, "shared bytes %zu to %zu of %u that the launch asked for", offset, offset + bytes, place.shared_bytes);
    return unsigned(offset);
}

void atomic_access(const void* p, size_t bytes, Site site) { race::atomic(p, bytes, site); }
void release_flag(const void* p) { race::release_flag(p); }
void acquire_flag(const void* p) { race::acquire_flag(p); }

} // namespace emulator
