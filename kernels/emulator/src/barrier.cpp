// The sixteen barriers of a block: number 0 is __syncthreads.
#include "../include/collectives.h"
#include "mutation.h"
#include "race.h"
#include "worker.h"

namespace emulator {

namespace {

void arrive(int id, int threads, bool wait, Site site) {
    Worker& w = *worker;
    Barrier& barrier = w.barriers[id];
    FiberThread& me = w.self();
    if (barrier.arrived == 0) {
        barrier.expected = threads;
        barrier.site = site;
    } else if (barrier.expected != threads) {
        fail(site, "barrier %d is for %d threads, at %s it was for %d", id, threads, text(barrier.site).c_str(), barrier.expected);
    }
    me.waits_at = site;
    me.waits_for_barrier = id;
    if (!wait) race::release(&barrier);
    if (++barrier.arrived == barrier.expected) {
        barrier.arrived = 0;
        unsigned waited[max_threads], count = 0;
        if (wait) waited[count++] = me.linear;
        for (unsigned i = 0; i < w.thread_count; i++) {
            FiberThread& thread = w.threads[i];
            if (thread.state != State::at_barrier || thread.waits_for_barrier != id) continue;
            waited[count++] = i;
            w.make_ready(thread);
        }
        race::join(waited, count, &barrier);
        w.may_leave();
    } else if (wait) {
        me.state = State::at_barrier;
        w.leave();
    }
}

} // namespace

// Stricter than the device, where threads that have exited no longer count: such kernels are reported as a deadlock.
void block_barrier(Site site) {
    const Mutation change = mutation(site);
    if (change == Mutation::left_out) return;
    if (change == Mutation::warp_alone) return warp_barrier(0xffffffffu, site);
    const Barrier& barrier = worker->barriers[0];
    if (barrier.arrived && (barrier.site.line != site.line || barrier.site.file != site.file))
        fail(site, "__syncthreads of diverged threads: others are at %s", text(barrier.site).c_str());
    arrive(0, int(worker->thread_count), true, site);
}

void named_barrier(int id, int threads, bool wait, Site site) {
    if (mutation(site) == Mutation::left_out) return;
    if (id < 0 || id >= named_barriers) fail(site, "barrier %d of %d", id, named_barriers);
    if (threads <= 0 || threads % int(warp_size) || threads > int(worker->thread_count))
        fail(site, "barrier %d for %d threads of a block of %u", id, threads, worker->thread_count);
    arrive(id, threads, wait, site);
}

} // namespace emulator
