// Barriers in shared memory that count arrivals and bytes, and the tensor memory accelerator's copies, which complete on them.
//
// What a barrier counts is kept beside shared memory, not in it. A copy lands somewhere between its issue and the end of
// the phase that waits for its bytes. eager: at the issue. lazy: when no thread can go on without it; until then the
// destination reads as NaN. random: either, or between. Copies land in any order.
#include "../include/ptx_sm90_twins.h"
#include "mutation.h"
#include "race.h"
#include "tensor_map.h"
#include "worker.h"
#include <algorithm>
#include <cstring>

namespace emulator {

namespace {

constexpr unsigned most_arrivals = (1 << 20) - 1;

Mbarrier& find(const uint64_t* barrier, Site site) {
    const unsigned offset = shared_offset(barrier, sizeof *barrier, site);
    auto& all = worker->mbarriers;
    auto found = all.find(offset);
    if (found == all.end()) fail(site, "there is no mbarrier at shared byte %u", offset);
    race::touch(barrier, sizeof *barrier, false, site);
    return found->second;
}

void end_phase_if_complete(Mbarrier& b) {
    if (b.pending || b.bytes) return;
    b.pending = b.count;
    b.phase++;
    race::forget(&b.past[b.phase % 2]);
}

/// Calls `f(row, from, skip, bytes)` for each row of the box: `bytes` bytes at `from` exist and belong `skip` bytes after
/// the row's start.
template <class F>
void each_row(const TensorMap& map, const BulkCopy& copy, F f) {
    unsigned rows = 1;
    for (unsigned i = 1; i < map.rank; i++) rows *= map.box[i];
    const int64_t x = copy.place[0], first = std::max<int64_t>(x, 0), end = std::min<int64_t>(x + map.box[0], map.size[0]);
    for (unsigned row = 0; row < rows; row++) {
        const unsigned char* from = map.base + first * map.element_bytes;
        bool exists = first < end;
        for (unsigned i = 1, rest = row; i < map.rank; rest /= map.box[i++]) {
            const int64_t at = int64_t(copy.place[i]) + rest % map.box[i];
            exists = exists && at >= 0 && at < int64_t(map.size[i]);
            from += at * int64_t(map.stride[i - 1]);
        }
        f(row, from, size_t(first - x) * map.element_bytes, exists ? size_t(end - first) * map.element_bytes : 0);
    }
}

/// Moves the part of the box that exists, fills the rest with zeros, and counts all of its bytes.
void land(const BulkCopy& copy) {
    TensorMap map;
    memcpy(&map, copy.map, sizeof map);
    const size_t start = size_t(copy.shared - place.shared), row_bytes = map.box[0] * map.element_bytes;
    each_row(map, copy, [&](unsigned row, const unsigned char* from, size_t skip, size_t exist) {
        unsigned char bytes[256 * 8] = {};
        memcpy(bytes + skip, from, exist);
        for (size_t at = 0; at < row_bytes; at += 16)
            memcpy(place.shared + permuted(start + row * row_bytes + at, map.swizzle), bytes + at, 16);
        copy.barrier->bytes -= int64_t(row_bytes);
    });
    end_phase_if_complete(*copy.barrier);
}

struct Wait {
    Mbarrier* barrier;
    unsigned parity;
};

bool has_ended(void* argument) {
    const Wait& wait = *static_cast<Wait*>(argument);
    return wait.barrier->phase % 2 != wait.parity;
}

std::string what_is_missing(void* argument) {
    const Mbarrier& b = *static_cast<Wait*>(argument)->barrier;
    return "the mbarrier at shared byte " + std::to_string(b.offset) + " lacks " + std::to_string(b.pending) + " arrivals and " +
           std::to_string(b.bytes) + " bytes";
}

} // namespace

void init_mbarrier(uint64_t* barrier, unsigned count, Site site) {
    Worker& w = *worker;
    const unsigned offset = shared_offset(barrier, sizeof *barrier, site);
    if (offset % sizeof *barrier) fail(site, "the address of an mbarrier is not a multiple of 8");
    if (!count || count > most_arrivals) fail(site, "an mbarrier of %u arrivals", count);
    if (w.mbarriers.size() == max_mbarriers) fail(site, "more than %u mbarriers", max_mbarriers);
    auto [at, fresh] = w.mbarriers.try_emplace(offset);
    if (!fresh) fail(site, "there is an mbarrier at shared byte %u already", offset);
    race::touch(barrier, sizeof *barrier, true, site);
    Mbarrier& b = at->second;
    b.offset = offset, b.number = unsigned(w.mbarriers.size()) - 1;
    b.count = b.pending = count;
    b.made_by = current->linear;
}

void fence_proxy(Site site) {
    if (mutation(site) == Mutation::left_out) return;
    for (auto& [offset, barrier] : worker->mbarriers)
        if (barrier.made_by == current->linear) barrier.fenced = true;
    race::fence_proxy();
}

void arrive_at_mbarrier(uint64_t* barrier, unsigned expected_bytes, Site site) {
    if (mutation(site) == Mutation::left_out) return;
    Mbarrier& b = find(barrier, site);
    if (!b.pending) fail(site, "the mbarrier at shared byte %u lacks no arrival in this phase", b.offset);
    if (expected_bytes > most_arrivals) fail(site, "an mbarrier that expects %u bytes", expected_bytes);
    race::release(&b.past[b.phase % 2]);
    b.bytes += expected_bytes;
    b.pending--;
    end_phase_if_complete(b);
    worker->may_leave();
}

void wait_for_mbarrier(uint64_t* barrier, unsigned parity, Site site) {
    if (mutation(site) == Mutation::left_out) return;
    Mbarrier& b = find(barrier, site);
    if (parity > 1) fail(site, "parity %u", parity);
    Wait wait{&b, parity};
    wait_until(has_ended, &wait, site, what_is_missing);
    // The phase that has ended is the one before the current one; before the first there is none.
    if (!b.phase) return;
    race::acquire(&b.past[parity]);
    race::learn(current->linear, race::unit_of_mbarrier(b.number), uint32_t(b.phase));
}

void copy_box(void* shared, const void* map_, uint64_t* barrier, const int* place_, unsigned rank, Site site) {
    Worker& w = *worker;
    TensorMap map;
    memcpy(&map, map_, sizeof map);
    if (size_t(map_) % 64) fail(site, "the address of a tensor map is not a multiple of 64");
    if (map.magic != TensorMap::encoded) fail(site, "no tensor map: cuTensorMapEncodeTiled did not make it");
    if (map.rank != rank) fail(site, "a copy of %u dimensions by a tensor map of %u", rank, map.rank);
    unsigned bytes = map.element_bytes;
    for (unsigned i = 0; i < rank; i++) bytes *= map.box[i];
    if (shared_offset(shared, bytes, site) % 128) fail(site, "the shared address of a box is not a multiple of 128");
    Mbarrier& b = find(barrier, site);
    if (!b.fenced)
        fail(site, "the thread that made the mbarrier at shared byte %u did not fence it for copies (fence_proxy_async)", b.offset);
    BulkCopy copy{static_cast<unsigned char*>(shared), {}, &b, {}, site};
    memcpy(copy.map, map_, sizeof copy.map);
    for (unsigned i = 0; i < rank; i++) copy.place[i] = place_[i];
    // Who waits for the phase to end knows of the copy's accesses.
    const unsigned unit = race::unit_of_mbarrier(b.number);
    const auto time = uint32_t(b.phase + 1);
    race::touch_as(unit, time, shared, bytes, true, site);
    each_row(map, copy, [&](unsigned, const unsigned char* from, size_t, size_t exist) {
        race::touch_as(unit, time, from, exist, false, site);
    });
    const Async mode = w.configuration.async;
    if (mode == Async::eager || (mode == Async::random && w.random() % 2)) return land(copy);
    memset(shared, 0xff, bytes);
    w.bulk_copies.push_back(copy);
}

bool Worker::land_bulk_copy() {
    if (bulk_copies.empty()) return false;
    const size_t which = configuration.async == Async::random ? size_t(random() % bulk_copies.size()) : 0;
    const BulkCopy copy = bulk_copies[which];
    bulk_copies.erase(bulk_copies.begin() + std::ptrdiff_t(which));
    land(copy);
    return true;
}

} // namespace emulator
