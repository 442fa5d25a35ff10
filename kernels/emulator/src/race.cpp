// The race detector. Kernels are compiled with -fsanitize=thread, whose hooks (race_hooks.cpp) report each load and store.
//
// Every thread has a vector clock: its own time, and how much of each other thread's past it knows of. Barriers, __syncwarp
// and mbarriers join clocks; shuffles, votes, mma and relaxed atomics do not, as in the PTX memory model. Every byte of
// shared and global memory remembers its last write and the accesses since; an access that does not know of a conflicting
// earlier one is a race whatever the schedule was. Blocks of one launch know nothing of each other, except through flags
// that are released and acquired; launches know all of earlier ones.
// What works beside the threads, copies of the tensor memory accelerator and wgmma, counts as threads whose time others
// learn where they wait for it; of what threads wrote in shared memory it sees only what they fenced (fence.proxy.async).
// Also found: reads and writes next to an allocation, which may be plain wrong numbers otherwise.
//
// Two things make it fast. Bytes that were accessed only together share what they remember: a page starts in cells of 16
// bytes and is split where a narrower access comes. And time goes on from block to block, and leaps for all threads at a
// barrier of the whole block, so that one comparison tells what everybody knows of, without the clocks.
#include "race.h"
#include "memory.h"
#include "symbols.h"
#include "worker.h"
#include <algorithm>
#include <memory>
#include <unordered_map>
#include <unordered_set>

namespace emulator::race {

namespace {

constexpr size_t page_bytes = 1024;
constexpr unsigned coarsest = 4; // log2 of a cell's bytes
/// Times of units are apart from those of threads.
constexpr uint32_t of_unit = 1u << 31;
/// The time of a copy that is still in flight: nobody knows of it.
constexpr uint32_t never = UINT32_MAX;

struct Access {
    uint32_t time = 0; // 0: there was none
    uint32_t thread : 11, place : 21;
    Access() : thread(0), place(0) {}
    Access(uint32_t time, unsigned thread, uint32_t place) : time(time), thread(thread), place(place) {}
};
static_assert(max_threads + max_warps + max_mbarriers <= 1 << 11 && sizeof(Access) == 8);

/// Accesses that do not know of each other.
struct List {
    std::vector<Access> entries; // first those of other blocks
    uint32_t others = 0;         // how many these are
    uint32_t run = 0;            // the block of the rest
    uint32_t latest = 0;         // of the times of the rest

    void clear() { entries.clear(), others = latest = 0; }
};

/// What few cells need: reads that found no room in the cell, and atomic accesses.
struct More {
    List reads, atomics;
};

/// Bytes that were accessed only together.
struct Cell {
    Access write;
    Access reads[2];      // none knows of another
    uint32_t more = 0;    // index of what it needs more, 0 for nothing
    bool crowded = false; // whether that holds accesses
};

struct Page {
    std::vector<Cell> cells = std::vector<Cell>(page_bytes >> coarsest);
    unsigned shift = coarsest; // log2 of a cell's bytes
    Range inside = {0, 0};     // the allocation that was accessed last here
};

/// A line of a twin's caller, or without a file an instruction's offset in the library.
struct Place {
    const char* file;
    uint32_t number;
};

/// When a block began.
struct Start {
    uint32_t thread, unit;
};

/// Of one launching host thread.
struct Detector {
    unsigned threads = 0, width = 0; // width: threads and units
    uint32_t latest = 0, latest_of_units = of_unit; // of all times of the launch
    std::vector<Start> starts;    // of the launch's blocks; a block is known by its index + 1
    Start start = {0, of_unit};   // of the running one: units' times are above it
    uint32_t settled = 0;         // every thread knows of what threads of the block did before
    std::vector<uint32_t> times;  // each thread's own
    std::vector<uint32_t> clocks; // [thread][other thread or unit]; what is settled may be missing
    std::vector<uint32_t> joined;
    std::vector<bool> seen;
    std::vector<std::vector<uint32_t>> fences; // of each thread, its times from which on what it wrote before is for units
    std::unordered_map<const void*, std::vector<uint32_t>> published;
    std::unordered_map<const void*, std::unordered_set<uint32_t>> flags; // the blocks that released them knew
    std::unordered_set<uint32_t> known_runs;
    std::unordered_map<size_t, std::unique_ptr<Page>> pages;
    struct {
        size_t number;
        Page* page;
    } recent_pages[1024] = {};
    std::vector<More> more = std::vector<More>(1);
    std::unique_ptr<Page> shared[(max_shared_bytes + page_bytes - 1) / page_bytes];
    std::vector<Range> allocations;
    std::vector<Place> places = {{nullptr, 0}};
    std::unordered_map<size_t, std::vector<uint32_t>> places_by_number;
    struct {
        Place place;
        uint32_t index;
    } recent_places[1024] = {};

    uint32_t run() const { return uint32_t(starts.size()); }
    uint32_t* clock(unsigned thread) { return &clocks[size_t(thread) * width]; }
    uint32_t tick(unsigned thread) {
        latest = std::max(latest, ++times[thread]);
        return times[thread];
    }
};

/// Of the launch that runs on this host thread.
__thread Detector* detector;

void merge(uint32_t* into, const uint32_t* from, unsigned count) {
    for (unsigned i = 0; i < count; i++) into[i] = std::max(into[i], from[i]);
}

uint32_t place_of(Detector& d, const char* file, uint32_t number) {
    auto& recent = d.recent_places[(size_t(file) + number) * 0x9E3779B97F4A7C15ULL >> 54];
    if (recent.place.file == file && recent.place.number == number) return recent.index;
    auto& same_number = d.places_by_number[number];
    auto found = std::find_if(same_number.begin(), same_number.end(), [&](uint32_t index) { return d.places[index].file == file; });
    if (found == same_number.end()) {
        found = same_number.insert(found, uint32_t(d.places.size()));
        d.places.push_back({file, number});
    }
    recent = {{file, number}, *found};
    return *found;
}
uint32_t place_of(Detector& d, Site site) { return place_of(d, site.file, uint32_t(site.line)); }

std::string text_of(const Detector& d, uint32_t place) {
    const auto [file, number] = d.places[place];
    return file ? text(Site{file, int(number)}) : source_lines(number);
}

/// Who asks: a thread, or a unit on its behalf, which knows what it knows.
struct Knower {
    unsigned thread;
    uint32_t time;
    const uint32_t* clock;
};

Knower running(Detector& d) { return {current->linear, d.times[current->linear], d.clock(current->linear)}; }

bool of_other_block(const Detector& d, uint32_t time) { return time & of_unit ? time <= d.start.unit : time < d.start.thread; }

/// Whether this block was told of the other one that made the access.
bool told(const Detector& d, uint32_t time) {
    if (d.known_runs.empty()) return false;
    const auto next = time & of_unit ? std::lower_bound(d.starts.begin(), d.starts.end(), time, [](const Start& s, uint32_t t) { return s.unit < t; })
                                     : std::upper_bound(d.starts.begin(), d.starts.end(), time, [](uint32_t t, const Start& s) { return t < s.thread; });
    return d.known_runs.count(uint32_t(next - d.starts.begin())) != 0;
}

/// Whether every thread of the block knows of a time of one of them, or none.
inline bool is_settled(const Detector& d, uint32_t time) { return time - d.start.thread < d.settled - d.start.thread || !time; }

inline bool knows(const Detector& d, const Knower& who, const Access& earlier) {
    if (is_settled(d, earlier.time)) return true;
    if (of_other_block(d, earlier.time)) return told(d, earlier.time);
    return earlier.time <= (earlier.thread == who.thread ? who.time : who.clock[earlier.thread]);
}

[[noreturn]] void report(const Detector& d, const void* pointer, bool write, uint32_t place, const Access& earlier, bool earlier_write) {
    const size_t offset = size_t(static_cast<const unsigned char*>(pointer) - emulator::place.shared);
    std::string memory = offset < max_shared_bytes ? "shared byte " + std::to_string(offset) : "global memory";
    for (const Range& range : d.allocations)
        if (DevicePointer(pointer) - range.begin < range.bytes)
            memory = "byte " + std::to_string(DevicePointer(pointer) - range.begin) + " of a buffer of " + std::to_string(range.bytes);
    const unsigned warps = d.width - d.threads - max_mbarriers;
    const std::string name = earlier.thread < d.threads           ? "thread " + std::to_string(earlier.thread)
                             : earlier.thread < d.threads + warps ? "wgmma of warp " + std::to_string(earlier.thread - d.threads)
                                                                  : "a bulk copy";
    const std::string who = of_other_block(d, earlier.time) ? "a thread " + std::to_string(earlier.thread) + " of another block" : name;
    fail({nullptr, 0}, "race: %s of %s at %s, after an unordered %s%s by %s at %s", write ? "write" : "read", memory.c_str(),
         text_of(d, place).c_str(), earlier_write ? "write" : "read", earlier.time == never ? " (a copy in flight)" : "", who.c_str(),
         text_of(d, earlier.place).c_str());
}

enum class Kind { read, write, atomic };

/// The first of the list that is not known, or null.
const Access* unknown(const Detector& d, const Knower& who, const List& list) {
    if (list.run == d.run() && !list.others && is_settled(d, list.latest)) return nullptr;
    for (const Access& one : list.entries)
        if (!knows(d, who, one)) return &one;
    return nullptr;
}

/// Fails if the access conflicts with one that it does not know of.
inline void check(const Detector& d, const Knower& who, const Cell& cell, const void* pointer, Kind kind, const Access& now) {
    const auto conflict = [&](const Access& earlier, bool earlier_write) {
        report(d, pointer, kind != Kind::read, now.place, earlier, earlier_write);
    };
    if (!knows(d, who, cell.write)) conflict(cell.write, true);
    if (kind != Kind::read)
        for (const Access& read : cell.reads)
            if (!knows(d, who, read)) conflict(read, false);
    if (!cell.crowded) return;
    const More& more = d.more[cell.more];
    if (kind != Kind::read)
        if (const Access* read = unknown(d, who, more.reads)) conflict(*read, false);
    if (kind != Kind::atomic)
        if (const Access* atomic = unknown(d, who, more.atomics)) conflict(*atomic, true);
}

/// Adds an access to `list`. What this one knows of may go: who knows of this one knows of that one.
void add(Detector& d, const Knower& who, List& list, const Access& now) {
    auto& all = list.entries;
    const auto own = [&] { return all.begin() + list.others; };
    if (list.run != d.run()) {
        // One of each block is enough, and one of all blocks where none is ever told of another.
        const auto first = d.flags.empty() ? all.begin() : own();
        if (!all.empty()) all.erase(first, all.end() - 1);
        all.erase(std::remove_if(all.begin(), all.end(), [&](const Access& one) { return knows(d, who, one); }), all.end());
        list.others = uint32_t(all.size()), list.run = d.run(), list.latest = 0;
    } else if (is_settled(d, list.latest)) {
        all.erase(own(), all.end());
        list.latest = 0;
    } else if (own() != all.end() && all.back().thread == now.thread) {
        all.pop_back();
    } else if (all.size() - list.others > 2 * d.threads) {
        // What is left has one access of each thread or unit.
        d.seen.assign(d.width, false);
        const auto goes = [&](const Access& one) {
            const bool again = d.seen[one.thread];
            d.seen[one.thread] = true;
            return again || knows(d, who, one);
        };
        all.erase(own(), std::remove_if(all.rbegin(), all.rend() - list.others, goes).base());
    }
    all.push_back(now);
    list.latest = std::max(list.latest, now.time);
}

/// Leaves `more` its room: who needed it will need it again.
inline void clear(Detector& d, Cell& cell) {
    cell.write = cell.reads[0] = cell.reads[1] = {};
    if (!cell.crowded) return;
    d.more[cell.more].reads.clear();
    d.more[cell.more].atomics.clear();
    cell.crowded = false;
}

inline void remember(Detector& d, const Knower& who, Cell& cell, Kind kind, const Access& now) {
    if (kind == Kind::write) {
        clear(d, cell);
        cell.write = now;
        return;
    }
    if (kind == Kind::read) {
        // A read that this one knows of no longer matters.
        Access* slot = nullptr;
        for (Access& read : cell.reads)
            if (knows(d, who, read)) {
                if (slot) read = {};
                else slot = &read;
            }
        // Nor does one of two by other blocks, where none is told of another.
        if (!slot && d.flags.empty() && of_other_block(d, cell.reads[0].time) && of_other_block(d, cell.reads[1].time)) slot = cell.reads;
        if (slot) {
            *slot = now;
            return;
        }
    }
    if (!cell.more) {
        cell.more = uint32_t(d.more.size());
        d.more.emplace_back();
    }
    cell.crowded = true;
    More& more = d.more[cell.more];
    add(d, who, kind == Kind::atomic ? more.atomics : more.reads, now);
}

/// Whether the thread that wrote has fenced it for units before the time that `who` knows of it.
bool fenced(const Detector& d, const Knower& who, const Access& written) {
    if (!written.time || written.thread >= d.threads) return true;
    const auto& times = d.fences[written.thread];
    const auto next = std::upper_bound(times.begin(), times.end(), written.time);
    return next != times.end() && knows(d, who, {*next, written.thread, 0});
}

Page& page_of(Detector& d, size_t address, bool shared) {
    if (shared) {
        auto& page = d.shared[(address - size_t(place.shared)) / page_bytes];
        if (!page) page = std::make_unique<Page>();
        return *page;
    }
    const size_t number = address / page_bytes;
    auto& recent = d.recent_pages[number % std::size(d.recent_pages)];
    if (recent.page && recent.number == number) return *recent.page;
    auto& page = d.pages[number];
    if (!page) page = std::make_unique<Page>();
    recent = {number, page.get()};
    return *page;
}

/// From now on the page is in cells of `1 << shift` bytes.
void split(Detector& d, Page& page, unsigned shift) {
    std::vector<Cell> parts(page_bytes >> shift);
    for (size_t i = 0; i < parts.size(); i++) {
        parts[i] = page.cells[i >> (page.shift - shift)];
        parts[i].more = parts[i].crowded ? uint32_t(d.more.size()) : 0;
        if (parts[i].crowded) d.more.push_back(More(d.more[page.cells[i >> (page.shift - shift)].more]));
    }
    page.cells.swap(parts);
    page.shift = shift;
}

/// Fails if the access is next to a device allocation instead of inside it; else the allocation, or nothing if it is far from any.
Range check_bounds(const Detector& d, size_t at, size_t bytes, bool write, uint32_t place) {
    auto next = std::upper_bound(d.allocations.begin(), d.allocations.end(), at + guard_bytes,
                                 [](DevicePointer p, const Range& range) { return p < range.begin; });
    if (next == d.allocations.begin()) return {0, 0};
    const Range& range = *std::prev(next);
    if (at >= range.begin && at + bytes <= range.begin + range.bytes) return range;
    if (at + bytes <= range.begin - guard_bytes || at >= range.begin + range.bytes + guard_bytes) return {0, 0};
    fail({nullptr, 0}, "%s of %zu bytes at %s, at byte %lld of a buffer of %zu", write ? "write" : "read", bytes,
         text_of(d, place).c_str(), (long long)(at - range.begin), range.bytes);
}

/// Calls `f(cell, address)` for the cells that are bytes begin..end.
template <class F>
inline void each_cell(Detector& d, size_t begin, size_t end, bool shared, F f) {
    while (begin < end) {
        Page& page = page_of(d, begin, shared);
        const size_t stop = std::min(end, (begin / page_bytes + 1) * page_bytes);
        const unsigned aligned = unsigned(__builtin_ctzll(begin | stop | 1 << coarsest));
        if (aligned < page.shift) split(d, page, aligned);
        Cell* cell = &page.cells[begin % page_bytes >> page.shift];
        for (const size_t step = size_t(1) << page.shift; begin < stop; begin += step) f(*cell++, begin);
    }
}

/// By the current thread or a unit that it started.
void access(Detector& d, const void* pointer, size_t bytes, Kind kind, const Access& now) {
    const size_t begin = size_t(pointer), offset = begin - size_t(emulator::place.shared);
    const bool shared = offset < max_shared_bytes, write = kind != Kind::read;
    if (shared) {
        if (offset + bytes > emulator::place.shared_bytes)
            fail({nullptr, 0}, "%s at %s of shared bytes %zu to %zu of %u", write ? "write" : "read", text_of(d, now.place).c_str(), offset,
                 offset + bytes, emulator::place.shared_bytes);
    } else if (Range& inside = page_of(d, begin, false).inside; begin - inside.begin >= inside.bytes || begin + bytes > inside.begin + inside.bytes) {
        inside = check_bounds(d, begin, bytes, write, now.place);
    }
    const Knower who = running(d);
    const bool needs_fence = shared && !write && now.thread >= d.threads;
    each_cell(d, begin, begin + bytes, shared, [&](Cell& cell, size_t at) {
        check(d, who, cell, reinterpret_cast<const void*>(at), kind, now);
        if (needs_fence && !fenced(d, who, cell.write))
            fail({nullptr, 0}, "%s reads shared byte %zu, which thread %u wrote at %s without a fence_proxy_async",
                 text_of(d, now.place).c_str(), at - size_t(emulator::place.shared), unsigned(cell.write.thread),
                 text_of(d, cell.write.place).c_str());
        remember(d, who, cell, kind, now);
    });
}

Access by_current(const Detector& d, uint32_t place) { return {d.times[current->linear], current->linear, place}; }

} // namespace

void start_launch() {
    // Not in the thread's own storage: a library that is loaded late has little of it.
    thread_local auto of_this_thread = std::make_unique<Detector>();
    Detector& d = *(detector = of_this_thread.get());
    d.latest = 0, d.latest_of_units = of_unit;
    d.starts.clear();
    d.clocks.clear();
    d.flags.clear();
    d.pages.clear();
    d.more.resize(1);
    for (auto& recent : d.recent_pages) recent = {};
    for (auto& page : d.shared) page.reset();
    d.allocations = allocated_ranges();
}

void start_block(unsigned threads, unsigned warps) {
    Detector& d = *detector;
    d.threads = threads, d.width = threads + warps + max_mbarriers;
    d.settled = ++d.latest;
    d.start = {d.settled, d.latest_of_units};
    d.starts.push_back(d.start);
    d.times.assign(threads, d.settled);
    d.clocks.resize(size_t(threads) * d.width); // what they tell of earlier blocks is earlier than all of this one
    d.fences.resize(threads);
    for (auto& times : d.fences) times.clear();
    d.published.clear();
    d.known_runs.clear();
    // Shared memory is a new one in each block.
    for (auto& page : d.shared)
        if (page)
            for (Cell& cell : page->cells) clear(d, cell);
}

void join(const unsigned* threads, unsigned count, const void* object) {
    Detector& d = *detector;
    auto& all = d.joined;
    all.assign(d.width, 0);
    if (count == d.threads) {
        d.settled = ++d.latest;
        std::fill(d.times.begin(), d.times.end(), d.settled);
        if (d.latest_of_units > d.start.unit) {
            const unsigned units = d.width - d.threads;
            for (unsigned i = 0; i < count; i++) merge(all.data(), d.clock(i) + d.threads, units);
            for (unsigned i = 0; i < count; i++) std::copy_n(all.begin(), units, d.clock(i) + d.threads);
        }
    } else {
        if (auto found = d.published.find(object); found != d.published.end()) merge(all.data(), found->second.data(), d.width);
        for (unsigned i = 0; i < count; i++) {
            merge(all.data(), d.clock(threads[i]), d.width);
            all[threads[i]] = d.times[threads[i]];
        }
        for (unsigned i = 0; i < count; i++) {
            std::copy(all.begin(), all.end(), d.clock(threads[i]));
            d.tick(threads[i]);
        }
    }
    d.published.erase(object);
}

void release(const void* object) {
    Detector& d = *detector;
    auto& past = d.published[object];
    past.resize(d.width);
    merge(past.data(), d.clock(current->linear), d.width);
    past[current->linear] = d.times[current->linear];
    d.tick(current->linear);
}

void acquire(const void* object) {
    Detector& d = *detector;
    auto found = d.published.find(object);
    if (found != d.published.end()) merge(d.clock(current->linear), found->second.data(), d.width);
}

void forget(const void* object) { detector->published.erase(object); }

void touch(const void* pointer, size_t bytes, bool write, Site site) {
    Detector& d = *detector;
    if (bytes) access(d, pointer, bytes, write ? Kind::write : Kind::read, by_current(d, place_of(d, site)));
}

unsigned unit_of_warp(unsigned warp) { return detector->threads + warp; }
unsigned unit_of_mbarrier(unsigned number) { return detector->width - max_mbarriers + number; }

void touch_as(unsigned unit, uint32_t time, const void* pointer, size_t bytes, bool write, Site site) {
    Detector& d = *detector;
    const Access now{d.start.unit + time, unit, place_of(d, site)};
    d.latest_of_units = std::max(d.latest_of_units, now.time);
    if (bytes) access(d, pointer, bytes, write ? Kind::write : Kind::read, now);
}

void learn(unsigned thread, unsigned unit, uint32_t time) {
    uint32_t& known = detector->clock(thread)[unit];
    known = std::max(known, detector->start.unit + time);
}

void fence_proxy() {
    Detector& d = *detector;
    d.fences[current->linear].push_back(d.tick(current->linear));
}

void begin_async(const void* pointer, size_t bytes, Site site) {
    Detector& d = *detector;
    access(d, pointer, bytes, Kind::write, {never, current->linear, place_of(d, site)});
}

void end_async(const void* pointer, size_t bytes, Site site) {
    Detector& d = *detector;
    const Access landed = by_current(d, place_of(d, site));
    each_cell(d, size_t(pointer), size_t(pointer) + bytes, true, [&](Cell& cell, size_t) { cell.write = landed; });
}

void atomic(const void* pointer, size_t bytes, Site site) {
    Detector& d = *detector;
    access(d, pointer, bytes, Kind::atomic, by_current(d, place_of(d, site)));
}

void release_flag(const void* pointer) {
    Detector& d = *detector;
    auto& runs = d.flags[pointer];
    runs.insert(d.known_runs.begin(), d.known_runs.end());
    runs.insert(d.run());
    release(pointer);
}

void acquire_flag(const void* pointer) {
    Detector& d = *detector;
    const auto& runs = d.flags[pointer];
    d.known_runs.insert(runs.begin(), runs.end());
    acquire(pointer);
}

void access_from_code(const void* pointer, size_t bytes, bool write, const void* code) {
    const auto* p = static_cast<const unsigned char*>(pointer);
    const auto within = [p](const void* begin, size_t size) { return size_t(p - static_cast<const unsigned char*>(begin)) < size; };
    const bool own = !current || within(worker->stacks, stack_bytes * max_threads) || within(worker, sizeof *worker) ||
                     within(&emulator::current, sizeof current) || within(&emulator::place, sizeof emulator::place);
    if (own) return;
    Detector& d = *detector;
    access(d, pointer, bytes, write ? Kind::write : Kind::read, by_current(d, place_of(d, nullptr, library_offset(code))));
}

} // namespace emulator::race
