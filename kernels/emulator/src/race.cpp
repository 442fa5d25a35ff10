// The race detector. Kernels are compiled with -fsanitize=thread, whose hooks (race_hooks.cpp) report each load and store.
//
// Every thread has a vector clock: its own time, and how much of each other thread's past it knows of. Barriers, __syncwarp
// and mbarriers join clocks; shuffles, votes, mma and relaxed atomics do not, as in the PTX memory model. Every two bytes of
// shared and global memory remember their last write and the reads since, and so does each byte that was accessed alone; an
// access that does not know of a conflicting earlier one is a race whatever the schedule was. Blocks of one launch know
// nothing of each other, except through flags that are released and acquired.
// What works beside the threads, copies of the tensor memory accelerator and wgmma, counts as threads whose time others
// learn where they wait for it; of what threads wrote in shared memory it sees only what they fenced (fence.proxy.async).
// Also found: reads and writes next to an allocation, which may be plain wrong numbers otherwise.
#include "race.h"
#include "memory.h"
#include "symbols.h"
#include "worker.h"
#include <algorithm>
#include <iterator>
#include <memory>
#include <unordered_map>
#include <unordered_set>

namespace emulator::race {

namespace {

constexpr size_t granule = 2;
constexpr size_t page_bytes = 4096;
constexpr size_t kept_pages = 2048;
constexpr int readers = 2;
/// The time of a copy that is still in flight: nobody knows of it.
constexpr uint32_t never = UINT32_MAX;

struct Access {
    uint32_t run = 0; // serial number of the block that made it, 0 for none
    uint32_t clock = 0;
    uint32_t place = 0;
    uint16_t thread = 0;
};

/// What few cells need: reads that found no room in the cell, and atomic accesses.
struct More {
    std::vector<Access> reads, atomics;
};

struct alignas(64) Cell { // one cache line
    Access write;
    Access reads[readers]; // none knows of another
    std::unique_ptr<More> more;
};

struct Page {
    Cell pairs[page_bytes / granule];
    /// Accesses to lone bytes, which share their two with a neighbour that another thread may write rightly; made when needed.
    std::unique_ptr<Cell[]> bytes;
};

/// Of one launching host thread.
struct Detector {
    uint32_t run = 0, first_run_of_launch = 0;
    unsigned threads = 0, warps = 0;
    unsigned width = 0;           // threads and units
    std::vector<uint32_t> clocks; // [thread][thread or unit]
    std::vector<std::vector<uint32_t>> fences; // of each thread, its times from which on what it wrote before is for units
    std::unordered_map<const void*, std::vector<uint32_t>> published;
    std::unordered_map<const void*, std::unordered_set<uint32_t>> flags; // the blocks that released them knew
    std::unordered_set<uint32_t> known_runs;
    std::unordered_map<size_t, std::unique_ptr<Page>> pages;
    struct {
        size_t number;
        Page* page;
    } recent_pages[256] = {};
    std::vector<Range> allocations;
    std::vector<Site> sites;

    uint32_t* clock(unsigned thread) { return &clocks[size_t(thread) * width]; }
};

Detector& detector() {
    // Not in the thread's own storage: a library that is loaded late has little of it.
    thread_local auto of_this_thread = std::make_unique<Detector>();
    return *of_this_thread;
}

void merge(uint32_t* into, const uint32_t* from, unsigned count) {
    for (unsigned i = 0; i < count; i++) into[i] = std::max(into[i], from[i]);
}

constexpr uint32_t site_flag = 1u << 31;

uint32_t place_of(Detector& d, Site site) {
    for (size_t i = 0; i < d.sites.size(); i++)
        if (d.sites[i].line == site.line && d.sites[i].file == site.file) return site_flag | uint32_t(i);
    d.sites.push_back(site);
    return site_flag | uint32_t(d.sites.size() - 1);
}

std::string text_of(const Detector& d, uint32_t place) {
    return place & site_flag ? text(d.sites[place & ~site_flag]) : source_lines(place);
}

/// Whether a thread with this clock knows of `earlier`.
inline __attribute__((always_inline)) bool knows(const Detector& d, const uint32_t* clock, const Access& earlier) {
    if (earlier.run == d.run) return earlier.clock <= clock[earlier.thread];
    return earlier.run < d.first_run_of_launch || d.known_runs.count(earlier.run) != 0; // none or an earlier launch, or told
}

[[noreturn]] void report(const Detector& d, const void* pointer, bool write, uint32_t place, const Access& earlier, bool earlier_write) {
    const size_t offset = size_t(static_cast<const unsigned char*>(pointer) - emulator::place.shared);
    std::string memory = offset < max_shared_bytes ? "shared byte " + std::to_string(offset) : "global memory";
    for (const Range& range : d.allocations)
        if (DevicePointer(pointer) - range.begin < range.bytes)
            memory = "byte " + std::to_string(DevicePointer(pointer) - range.begin) + " of a buffer of " + std::to_string(range.bytes);
    const std::string name = earlier.thread < d.threads             ? "thread " + std::to_string(earlier.thread)
                             : earlier.thread < d.threads + d.warps ? "wgmma of warp " + std::to_string(earlier.thread - d.threads)
                                                                    : "a bulk copy";
    const std::string who = earlier.run == d.run ? name : "a thread " + std::to_string(earlier.thread) + " of another block";
    fail({nullptr, 0}, "race: %s of %s at %s, after an unordered %s%s by %s at %s", write ? "write" : "read", memory.c_str(),
         text_of(d, place).c_str(), earlier_write ? "write" : "read", earlier.clock == never ? " (a copy in flight)" : "", who.c_str(),
         text_of(d, earlier.place).c_str());
}

enum class Kind { read, write, atomic };

/// Fails if the access conflicts with one that it does not know of.
void check(const Detector& d, const uint32_t* clock, const Cell& cell, const void* pointer, Kind kind, const Access& now) {
    const auto check_one = [&](const Access& earlier, bool earlier_write) {
        if (!knows(d, clock, earlier)) report(d, pointer, kind != Kind::read, now.place, earlier, earlier_write);
    };
    check_one(cell.write, true);
    if (kind != Kind::read)
        for (const Access& read : cell.reads) check_one(read, false);
    if (!cell.more) return;
    if (kind != Kind::read)
        for (const Access& read : cell.more->reads) check_one(read, false);
    if (kind != Kind::atomic)
        for (const Access& atomic : cell.more->atomics) check_one(atomic, true);
}

/// Adds an access to `list`, which keeps one of other blocks. What this one knows of goes when there is much of it: who
/// knows of this one knows of that one.
void add(const Detector& d, const uint32_t* clock, std::vector<Access>& list, const Access& now) {
    if (!list.empty() && list.back().run != now.run) list.erase(list.begin(), list.end() - 1);
    else if (!list.empty() && list.back().thread == now.thread) list.pop_back();
    if (list.size() > 2 * d.threads)
        list.erase(std::remove_if(list.begin(), list.end(), [&](const Access& one) { return knows(d, clock, one); }), list.end());
    list.push_back(now);
}

/// Leaves `more` its room: who needed it will need it again.
void clear(Cell& cell) {
    cell.write = {};
    std::fill(std::begin(cell.reads), std::end(cell.reads), Access{});
    if (cell.more) cell.more->reads.clear(), cell.more->atomics.clear();
}

void remember(const Detector& d, const uint32_t* clock, Cell& cell, Kind kind, const Access& now) {
    if (kind == Kind::write) {
        clear(cell);
        cell.write = now;
        return;
    }
    if (kind == Kind::read) {
        // A read that this one knows of no longer matters.
        Access* slot = nullptr;
        for (Access& read : cell.reads)
            if (knows(d, clock, read)) {
                if (slot) read = {};
                else slot = &read;
            }
        if (slot) {
            *slot = now;
            return;
        }
    }
    if (!cell.more) cell.more = std::make_unique<More>();
    add(d, clock, kind == Kind::atomic ? cell.more->atomics : cell.more->reads, now);
}

/// Whether the thread that wrote has fenced it for units before the time that `clock` knows of it.
bool fenced(const Detector& d, const uint32_t* clock, const Access& written) {
    if (written.run != d.run || written.thread >= d.threads) return true;
    const auto& times = d.fences[written.thread];
    const auto next = std::upper_bound(times.begin(), times.end(), written.clock);
    return next != times.end() && *next <= clock[written.thread];
}

Page& page(Detector& d, size_t number) {
    auto& recent = d.recent_pages[number % std::size(d.recent_pages)];
    if (recent.page && recent.number == number) return *recent.page;
    auto& p = d.pages[number];
    if (!p) p = std::make_unique<Page>();
    recent = {number, p.get()};
    return *p;
}

void forget_pages(Detector& d) {
    for (auto& recent : d.recent_pages) recent = {};
}

/// Fails if the access is next to a device allocation instead of inside it.
void check_bounds(const Detector& d, const void* pointer, size_t bytes, bool write, uint32_t place) {
    const auto at = DevicePointer(pointer);
    auto next = std::upper_bound(d.allocations.begin(), d.allocations.end(), at + guard_bytes,
                                 [](DevicePointer p, const Range& range) { return p < range.begin; });
    if (next == d.allocations.begin()) return;
    const Range& range = *std::prev(next);
    if (at >= range.begin && at + bytes <= range.begin + range.bytes) return;
    if (at + bytes <= range.begin - guard_bytes || at >= range.begin + range.bytes + guard_bytes) return;
    fail({nullptr, 0}, "%s of %zu bytes at %s, at byte %lld of a buffer of %zu", write ? "write" : "read", bytes,
         text_of(d, place).c_str(), (long long)(at - range.begin), range.bytes);
}

/// Checks lone accesses to bytes begin..end of a pair, and adds this one where it is `lone` itself.
void access_bytes(Detector& d, const uint32_t* clock, Page& of, size_t begin, size_t end, bool lone, Kind kind, const Access& now) {
    if (!of.bytes) of.bytes = std::make_unique<Cell[]>(page_bytes);
    for (size_t byte = begin; byte < end; byte++) {
        Cell& cell = of.bytes[byte % page_bytes];
        check(d, clock, cell, reinterpret_cast<const void*>(byte), kind, now);
        if (lone) remember(d, clock, cell, kind, now);
    }
}

/// By `actor`, the current thread or a unit that it started.
void access(const void* pointer, size_t bytes, bool write, uint32_t place, uint32_t time, unsigned actor, bool atomic = false) {
    Detector& d = detector();
    const auto* p = static_cast<const unsigned char*>(pointer);
    const bool shared = size_t(p - emulator::place.shared) < max_shared_bytes;
    if (shared) {
        const size_t offset = size_t(p - emulator::place.shared);
        if (offset + bytes > emulator::place.shared_bytes)
            fail({nullptr, 0}, "%s at %s of shared bytes %zu to %zu of %u", write ? "write" : "read", text_of(d, place).c_str(), offset,
                 offset + bytes, emulator::place.shared_bytes);
    } else {
        check_bounds(d, pointer, bytes, write, place);
    }
    const Access now{d.run, time, place, uint16_t(actor)};
    const Kind kind = atomic ? Kind::atomic : write ? Kind::write : Kind::read;
    const uint32_t* clock = d.clock(current->linear);
    const bool needs_fence = shared && !write && actor >= d.threads;
    const size_t begin = size_t(p), end = begin + bytes;
    for (size_t at = begin / granule * granule; at < end;) {
        Page& of = page(d, at / page_bytes);
        do {
            Cell& pair = of.pairs[at % page_bytes / granule];
            check(d, clock, pair, reinterpret_cast<const void*>(at), kind, now);
            if (needs_fence && !fenced(d, clock, pair.write))
                fail({nullptr, 0}, "%s reads shared byte %zu, which thread %u wrote at %s without a fence_proxy_async",
                     text_of(d, place).c_str(), at - size_t(emulator::place.shared), unsigned(pair.write.thread),
                     text_of(d, pair.write.place).c_str());
            const bool low = at >= begin, high = at + 1 < end, whole = low && high;
            if (whole) remember(d, clock, pair, kind, now);
            if (!whole || of.bytes) access_bytes(d, clock, of, at + !low, at + 1 + high, !whole, kind, now);
            at += granule;
        } while (at < end && at % page_bytes);
    }
}

uint32_t now() { return detector().clock(current->linear)[current->linear]; }

} // namespace

void start_launch() {
    Detector& d = detector();
    d.first_run_of_launch = d.run + 1;
    d.allocations = allocated_ranges();
    d.flags.clear();
    if (d.pages.size() > kept_pages) d.pages.clear();
    forget_pages(d);
}

void start_block(unsigned threads, unsigned warps) {
    Detector& d = detector();
    d.run++;
    d.threads = threads, d.warps = warps;
    d.width = threads + warps + max_mbarriers;
    d.clocks.assign(size_t(threads) * d.width, 0);
    d.fences.assign(threads, {});
    for (unsigned i = 0; i < threads; i++) d.clock(i)[i] = 1;
    d.published.clear();
    d.known_runs.clear();
    // Shared memory is a new one in each block.
    for (size_t at = 0; at < place.shared_bytes; at += page_bytes)
        if (auto old = d.pages.find((size_t(place.shared) + at) / page_bytes); old != d.pages.end()) {
            for (Cell& cell : old->second->pairs) clear(cell);
            old->second->bytes.reset();
        }
}

void join_warp(unsigned warp, unsigned mask) {
    Detector& d = detector();
    std::vector<uint32_t> all(d.width);
    for (unsigned m = mask; m; m &= m - 1) merge(all.data(), d.clock(warp * warp_size + unsigned(__builtin_ctz(m))), d.width);
    for (unsigned m = mask; m; m &= m - 1) {
        const unsigned thread = warp * warp_size + unsigned(__builtin_ctz(m));
        std::copy(all.begin(), all.end(), d.clock(thread));
        d.clock(thread)[thread]++;
    }
}

void release(const void* object) {
    Detector& d = detector();
    auto& past = d.published[object];
    past.resize(d.width);
    uint32_t* mine = d.clock(current->linear);
    merge(past.data(), mine, d.width);
    mine[current->linear]++;
}

void acquire(const void* object, unsigned thread) {
    Detector& d = detector();
    auto found = d.published.find(object);
    if (found != d.published.end()) merge(d.clock(thread), found->second.data(), d.width);
}

void forget(const void* object) { detector().published.erase(object); }

void touch(const void* pointer, size_t bytes, bool write, Site site) {
    if (bytes) access(pointer, bytes, write, place_of(detector(), site), now(), current->linear);
}

unsigned unit_of_warp(unsigned warp) { return detector().threads + warp; }
unsigned unit_of_mbarrier(unsigned number) { return detector().threads + detector().warps + number; }

void touch_as(unsigned unit, uint32_t time, const void* pointer, size_t bytes, bool write, Site site) {
    if (bytes) access(pointer, bytes, write, place_of(detector(), site), time, unit);
}

void learn(unsigned thread, unsigned unit, uint32_t time) {
    uint32_t& known = detector().clock(thread)[unit];
    known = std::max(known, time);
}

void fence_proxy() {
    Detector& d = detector();
    uint32_t& mine = d.clock(current->linear)[current->linear];
    d.fences[current->linear].push_back(++mine);
}

void begin_async(const void* pointer, size_t bytes, Site site) {
    access(pointer, bytes, true, place_of(detector(), site), never, current->linear);
}

void end_async(const void* pointer, size_t bytes, Site site) {
    Detector& d = detector();
    const Access landed{d.run, now(), place_of(d, site), uint16_t(current->linear)};
    for (size_t at = size_t(pointer); at < size_t(pointer) + bytes; at += granule)
        page(d, at / page_bytes).pairs[at % page_bytes / granule].write = landed;
}

void atomic(const void* pointer, size_t bytes, Site site) {
    access(pointer, bytes, true, place_of(detector(), site), now(), current->linear, true);
}

void release_flag(const void* pointer) {
    Detector& d = detector();
    auto& runs = d.flags[pointer];
    runs.insert(d.known_runs.begin(), d.known_runs.end());
    runs.insert(d.run);
    release(pointer);
}

void acquire_flag(const void* pointer) {
    Detector& d = detector();
    const auto& runs = d.flags[pointer];
    d.known_runs.insert(runs.begin(), runs.end());
    acquire(pointer, current->linear);
}

void access_from_code(const void* pointer, size_t bytes, bool write, const void* code) {
    const auto* p = static_cast<const unsigned char*>(pointer);
    const auto within = [p](const void* begin, size_t size) { return size_t(p - static_cast<const unsigned char*>(begin)) < size; };
    const bool own = !current || within(worker->stacks, stack_bytes * max_threads) || within(worker, sizeof *worker) ||
                     within(&emulator::current, sizeof current) || within(&emulator::place, sizeof emulator::place);
    if (!own) access(pointer, bytes, write, library_offset(code), now(), current->linear);
}

} // namespace emulator::race
