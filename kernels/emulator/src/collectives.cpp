// Where the lanes of a warp meet, and what shuffles, votes and reductions do there.
#include "../include/collectives.h"
#include "mutation.h"
#include "race.h"
#include "worker.h"

namespace emulator {

namespace {

template <class Visit>
void for_lanes(unsigned mask, Visit visit) {
    for (; mask; mask &= mask - 1) visit(unsigned(__builtin_ctz(mask)));
}

bool aligned(Collective kind) { return kind >= Collective::ldmatrix; }

struct Vote {
    unsigned predicate, ballot;
};

struct Reduce {
    Reduction kind;
    unsigned value, result;
};

unsigned combine(Reduction kind, unsigned a, unsigned b) {
    switch (kind) {
    case Reduction::add: return a + b;
    case Reduction::min: return b < a ? b : a;
    case Reduction::max: return a < b ? b : a;
    case Reduction::bit_and: return a & b;
    case Reduction::bit_or: return a | b;
    case Reduction::bit_xor: return a ^ b;
    case Reduction::min_signed: return int(b) < int(a) ? b : a;
    case Reduction::max_signed: return int(a) < int(b) ? b : a;
    }
    return 0;
}

} // namespace

void meet(unsigned mask, Collective kind, void* operands, Meeting work, Site site) {
    Worker& w = *worker;
    FiberThread& me = w.self();
    Warp& warp = w.warps[me.warp];
    const unsigned my_bit = 1u << me.lane;
    if (!(mask & my_bit)) fail(site, "lane %u is not in its own mask %08x", me.lane, mask);
    Rendezvous* here = nullptr;
    for (Rendezvous& other : warp.pending) {
        if (!(other.mask & mask)) continue;
        if (other.mask != mask || other.kind != kind || (aligned(kind) && other.site.line != site.line))
            fail(site, "this warp collective (mask %08x) meets another one that waits at %s (mask %08x)", mask,
                 text(other.site).c_str(), other.mask);
        here = &other;
    }
    if (!here) {
        warp.pending.push_back({mask, 0, kind, {}, site});
        here = &warp.pending.back();
    }
    here->arrived |= my_bit;
    here->operands[me.lane] = operands;
    me.waits_at = site;
    if (here->arrived != mask) {
        me.state = State::in_collective;
        return w.leave();
    }
    work(mask, here->operands);
    if (kind == Collective::sync) {
        unsigned threads[warp_size], count = 0;
        for_lanes(mask, [&](unsigned lane) { threads[count++] = me.warp * warp_size + lane; });
        race::join(threads, count, nullptr);
    }
    *here = warp.pending.back();
    warp.pending.pop_back();
    for_lanes(mask & ~my_bit, [&](unsigned lane) { w.make_ready(w.threads[me.warp * warp_size + lane]); });
    w.may_leave();
}

void warp_barrier(unsigned mask, Site site) {
    if (mutation(site) == Mutation::left_out) return;
    meet(mask, Collective::sync, nullptr, [](unsigned, void* const*) {}, site);
}

void shuffle(unsigned mask, Shuffle& part, Site site) {
    auto exchange = [](unsigned mask, void* const* operands) {
        for_lanes(mask, [&](unsigned lane) {
            auto& to = *static_cast<Shuffle*>(operands[lane]);
            if (!(mask >> to.source & 1))
                fail(worker->self().waits_at, "lane %u shuffles from lane %u, which is not in mask %08x", lane, to.source, mask);
            to.get = static_cast<Shuffle*>(operands[to.source])->give;
        });
    };
    meet(mask, Collective::shuffle, &part, exchange, site);
}

unsigned ballot(unsigned mask, bool predicate, Site site) {
    Vote vote{predicate, 0};
    auto count = [](unsigned mask, void* const* operands) {
        unsigned ballot = 0;
        for_lanes(mask, [&](unsigned lane) { ballot |= static_cast<Vote*>(operands[lane])->predicate << lane; });
        for_lanes(mask, [&](unsigned lane) { static_cast<Vote*>(operands[lane])->ballot = ballot; });
    };
    meet(mask, Collective::vote, &vote, count, site);
    return vote.ballot;
}

unsigned reduce(unsigned mask, Reduction kind, unsigned value, Site site) {
    Reduce part{kind, value, 0};
    auto combine_all = [](unsigned mask, void* const* operands) {
        const auto& first = *static_cast<Reduce*>(operands[__builtin_ctz(mask)]);
        unsigned result = first.value;
        for_lanes(mask & (mask - 1), [&](unsigned lane) {
            const auto& part = *static_cast<Reduce*>(operands[lane]);
            if (part.kind != first.kind) fail(worker->self().waits_at, "lanes reduce by different operations");
            result = combine(first.kind, result, part.value);
        });
        for_lanes(mask, [&](unsigned lane) { static_cast<Reduce*>(operands[lane])->result = result; });
    };
    meet(mask, Collective::reduce, &part, combine_all, site);
    return part.result;
}

} // namespace emulator
