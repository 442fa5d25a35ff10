// cp.async: a copy lands somewhere between its issue and the wait of its own thread that covers it.
//
// eager: at the issue. lazy: at the wait; until then the destination reads as NaN. random: either.
#include "../include/ptx_twins.h"
#include "mutation.h"
#include "race.h"
#include "worker.h"

namespace emulator {

namespace {

void land(const Copy& copy) {
    if (copy.landed) return;
    memcpy(copy.shared, copy.global, copy.source_bytes);
    memset(copy.shared + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
}

/// The running thread waits for its copies of groups below `limit`.
void land_groups(uint64_t limit) {
    auto& copies = worker->self().copies;
    auto copy = copies.begin();
    for (; copy != copies.end() && copy->group < limit; ++copy) {
        land(*copy);
        race::end_async(copy->shared, copy->bytes, copy->site);
    }
    copies.erase(copies.begin(), copy);
}

} // namespace

void copy_async(void* shared, const void* global, unsigned bytes, unsigned source_bytes, Site site) {
    Worker& w = *worker;
    FiberThread& me = w.self();
    if (shared_offset(shared, bytes, site) % bytes) fail(site, "the shared address of cp.async is not a multiple of %u", bytes);
    if (size_t(global) % bytes) fail(site, "the global address of cp.async is not a multiple of %u", bytes);
    if (source_bytes > bytes) fail(site, "cp.async of %u bytes from %u", bytes, source_bytes);
    race::touch(global, source_bytes, false, site);
    race::begin_async(shared, bytes, site);
    Copy copy{static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global), bytes, source_bytes, me.groups, false, site};
    const Async mode = w.configuration.async;
    if (mode == Async::eager || (mode == Async::random && w.random() % 2)) {
        land(copy);
        copy.landed = true;
    } else {
        memset(shared, 0xff, bytes);
    }
    me.copies.push_back(copy);
}

void commit_group(Site site) {
    if (mutation(site) != Mutation::left_out) worker->self().groups++;
}

void wait_group(unsigned newest_pending, Site site) {
    const Mutation change = mutation(site);
    if (change == Mutation::left_out) return;
    if (change == Mutation::one_short) newest_pending++;
    const uint64_t groups = worker->self().groups;
    land_groups(groups > newest_pending ? groups - newest_pending : 0);
}

void wait_all(Site site) {
    if (mutation(site) != Mutation::left_out) land_groups(UINT64_MAX);
}

} // namespace emulator
