// The race detector. Kernels are compiled with -fsanitize=thread, whose hooks (race_hooks.cpp) report each load and store.
//
// Every thread has a vector clock: its own time, and how much of each other thread's past it knows of. Barriers, __syncwarp
// and mbarriers join clocks; shuffles, votes and mma do not, as in the PTX memory model. Every two bytes of shared and
// global memory remember their last write and the reads since; an access that does not know of a conflicting earlier one
// is a race whatever the schedule was. Blocks of one launch know nothing of each other, except through atomics.
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
constexpr int readers = 3;
/// The time of a copy that is still in flight: nobody knows of it.
constexpr uint32_t never = UINT32_MAX;

struct Access {
    uint32_t run = 0; // serial number of the block that made it, 0 for none
    uint32_t clock = 0;
    uint32_t place = 0;
    uint16_t thread = 0;
};

struct Cell {
    Access write;
    Access reads[readers]; // none knows of another
};

using Page = std::unique_ptr<Cell[]>;

/// Of one launching host thread.
struct Detector {
    uint32_t run = 0, first_run_of_launch = 0;
    unsigned threads = 0;
    std::vector<uint32_t> clocks; // [thread][thread]
    std::unordered_map<const void*, std::vector<uint32_t>> published;
    std::unordered_map<const void*, std::unordered_set<uint32_t>> atomics;
    std::unordered_set<uint32_t> known_runs;
    std::unordered_map<size_t, Page> pages;
    struct {
        size_t number;
        Cell* cells;
    } recent_pages[256] = {};
    std::vector<Range> allocations;
    std::vector<Site> sites;

    uint32_t* clock(unsigned thread) { return &clocks[size_t(thread) * threads]; }
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
bool knows(const Detector& d, const uint32_t* clock, const Access& earlier) {
    if (earlier.run == d.run) return earlier.clock <= clock[earlier.thread];
    return earlier.run < d.first_run_of_launch || d.known_runs.count(earlier.run) != 0; // none or an earlier launch, or told
}

[[noreturn]] void report(Detector& d, const void* pointer, bool write, uint32_t place, const Access& earlier, bool earlier_write) {
    const size_t offset = size_t(static_cast<const unsigned char*>(pointer) - emulator::place.shared);
    std::string memory = offset < max_shared_bytes ? "shared byte " + std::to_string(offset) : "global memory";
    for (const Range& range : d.allocations)
        if (DevicePointer(pointer) - range.begin < range.bytes)
            memory = "byte " + std::to_string(DevicePointer(pointer) - range.begin) + " of a buffer of " + std::to_string(range.bytes);
    const std::string who = earlier.run == d.run ? "thread " + std::to_string(earlier.thread)
                                                 : "a thread " + std::to_string(earlier.thread) + " of another block";
    fail({nullptr, 0}, "race: %s of %s at %s, after an unordered %s%s by %s at %s", write ? "write" : "read", memory.c_str(),
         text_of(d, place).c_str(), earlier_write ? "write" : "read", earlier.clock == never ? " (a copy in flight)" : "", who.c_str(),
         text_of(d, earlier.place).c_str());
}

void check(Detector& d, const uint32_t* clock, Cell& cell, const void* pointer, bool write, const Access& now) {
    if (!knows(d, clock, cell.write)) report(d, pointer, write, now.place, cell.write, true);
    if (write) {
        for (Access& read : cell.reads) {
            if (!knows(d, clock, read)) report(d, pointer, true, now.place, read, false);
            read = {};
        }
        cell.write = now;
        return;
    }
    // A read that this one knows of no longer matters: who knows of this one knows of that one.
    Access* slot = nullptr;
    for (Access& read : cell.reads)
        if (knows(d, clock, read)) {
            if (slot) read = {};
            else slot = &read;
        }
    (slot ? *slot : cell.reads[(now.thread + d.run) % readers]) = now;
}

Cell* page(Detector& d, size_t number) {
    auto& recent = d.recent_pages[number % std::size(d.recent_pages)];
    if (recent.cells && recent.number == number) return recent.cells;
    Page& p = d.pages[number];
    if (!p) p = std::make_unique<Cell[]>(page_bytes / granule);
    recent = {number, p.get()};
    return p.get();
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

void access(const void* pointer, size_t bytes, bool write, uint32_t place, uint32_t time) {
    Detector& d = detector();
    const auto* p = static_cast<const unsigned char*>(pointer);
    if (size_t(p - emulator::place.shared) < max_shared_bytes) {
        const size_t offset = size_t(p - emulator::place.shared);
        if (offset + bytes > emulator::place.shared_bytes)
            fail({nullptr, 0}, "%s at %s of shared bytes %zu to %zu of %u", write ? "write" : "read", text_of(d, place).c_str(), offset,
                 offset + bytes, emulator::place.shared_bytes);
    } else {
        check_bounds(d, pointer, bytes, write, place);
    }
    // A lone byte shares its two with a neighbour, which another thread may write rightly: races of such are not seen.
    if (bytes < granule) return;
    const Access now{d.run, time, place, uint16_t(current->linear)};
    const uint32_t* clock = d.clock(current->linear);
    for (size_t at = size_t(p) / granule, end = (size_t(p) + bytes + granule - 1) / granule; at < end;) {
        constexpr size_t cells = page_bytes / granule;
        Cell* row = page(d, at / cells);
        do check(d, clock, row[at % cells], reinterpret_cast<const void*>(at * granule), write, now);
        while (++at < end && at % cells);
    }
}

uint32_t now() { return detector().clock(current->linear)[current->linear]; }

} // namespace

void start_launch() {
    Detector& d = detector();
    d.first_run_of_launch = d.run + 1;
    d.allocations = allocated_ranges();
    d.atomics.clear();
    if (d.pages.size() > kept_pages) d.pages.clear();
    forget_pages(d);
}

void start_block(unsigned threads) {
    Detector& d = detector();
    d.run++;
    d.threads = threads;
    d.clocks.assign(size_t(threads) * threads, 0);
    for (unsigned i = 0; i < threads; i++) d.clock(i)[i] = 1;
    d.published.clear();
    d.known_runs.clear();
    // Shared memory is a new one in each block.
    for (size_t at = 0; at < place.shared_bytes; at += page_bytes)
        if (auto old = d.pages.find((size_t(place.shared) + at) / page_bytes); old != d.pages.end())
            std::fill_n(old->second.get(), page_bytes / granule, Cell{});
}

void join_warp(unsigned warp, unsigned mask) {
    Detector& d = detector();
    std::vector<uint32_t> all(d.threads);
    for (unsigned m = mask; m; m &= m - 1) merge(all.data(), d.clock(warp * warp_size + unsigned(__builtin_ctz(m))), d.threads);
    for (unsigned m = mask; m; m &= m - 1) {
        const unsigned thread = warp * warp_size + unsigned(__builtin_ctz(m));
        std::copy(all.begin(), all.end(), d.clock(thread));
        d.clock(thread)[thread]++;
    }
}

void release(const void* object) {
    Detector& d = detector();
    auto& past = d.published[object];
    past.resize(d.threads);
    uint32_t* mine = d.clock(current->linear);
    merge(past.data(), mine, d.threads);
    mine[current->linear]++;
}

void acquire(const void* object, unsigned thread) {
    Detector& d = detector();
    auto found = d.published.find(object);
    if (found != d.published.end()) merge(d.clock(thread), found->second.data(), d.threads);
}

void forget(const void* object) { detector().published.erase(object); }

void touch(const void* pointer, size_t bytes, bool write, Site site) {
    if (bytes) access(pointer, bytes, write, place_of(detector(), site), now());
}

void begin_async(const void* pointer, size_t bytes, Site site) { access(pointer, bytes, true, place_of(detector(), site), never); }

void end_async(const void* pointer, size_t bytes, Site site) {
    Detector& d = detector();
    const Access landed{d.run, now(), place_of(d, site), uint16_t(current->linear)};
    for (size_t at = size_t(pointer) / granule; at < (size_t(pointer) + bytes) / granule; at++) {
        constexpr size_t cells = page_bytes / granule;
        page(d, at / cells)[at % cells].write = landed;
    }
}

void atomic(const void* pointer) {
    Detector& d = detector();
    auto& runs = d.atomics[pointer];
    d.known_runs.insert(runs.begin(), runs.end());
    runs.insert(d.known_runs.begin(), d.known_runs.end());
    runs.insert(d.run);
    release(pointer);
    acquire(pointer, current->linear);
}

void access_from_code(const void* pointer, size_t bytes, bool write, const void* code) {
    const auto* p = static_cast<const unsigned char*>(pointer);
    const auto within = [p](const void* begin, size_t size) { return size_t(p - static_cast<const unsigned char*>(begin)) < size; };
    const bool own = !current || within(worker->stacks, stack_bytes * max_threads) || within(worker, sizeof *worker) ||
                     within(&emulator::current, sizeof current) || within(&emulator::place, sizeof emulator::place);
    if (!own) access(pointer, bytes, write, library_offset(code), now());
}

} // namespace emulator::race
