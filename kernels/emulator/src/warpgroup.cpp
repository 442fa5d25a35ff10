// wgmma. PTX makes the lanes of one warp wait for each other, not the four warps: each warp here makes its own 16 rows
// when it comes to them, so that warps may drift apart as on the device.
//
// A product runs somewhere between its issue and the wait for its group. eager: at the issue. lazy: at the wait, so that
// sums read before are old. random: either, in order. Shared memory that a product reads is in use until a lane has
// waited for its group (race.cpp).
#include "../include/ptx_sm90_twins.h"
#include "../../lib/fragments.cuh"
#include "mutation.h"
#include "race.h"
#include "tensor_map.h"
#include "worker.h"
#include <algorithm>
#include <cstring>

namespace emulator {

namespace {

constexpr unsigned whole_warp = 0xffffffffu;
constexpr unsigned line_bytes = 128;
/// The only layout of a descriptor that is emulated: rows of 128 bytes whose chunks are permuted.
constexpr unsigned swizzle_128 = 1, chunk_bits = 3;

size_t field(uint64_t descriptor, int from) { return size_t(descriptor >> from & 0x3fff) << 4; }

/// Offset in shared memory of eight elements of 16 bits of line `line` (of M or N) and k: eight k of a line, or
/// `across`, eight lines of a k (PTX ISA, "Shared Memory Matrix Layout").
size_t chunk_at(uint64_t descriptor, int line, int k, bool across) {
    const size_t start = field(descriptor, 0), block = field(descriptor, 16), eight_rows = field(descriptor, 32);
    const int row = across ? k : line, column = across ? line % 64 : k;
    const size_t blocks = across ? size_t(line / 64) * block : 0;
    return permuted(start + blocks + size_t(row / 8) * eight_rows + size_t(row % 8) * line_bytes + size_t(column) * 2, chunk_bits);
}

/// Calls `put(line, k, value)` for 16 k of lines `first..first + count`.
template <class Put>
void read_operand(uint64_t descriptor, int first, int count, bool across, Put put) {
    const auto eight = [&](int line, int k, int step_line, int step_k) {
        uint16_t bits[8];
        memcpy(bits, place.shared + chunk_at(descriptor, line, k, across), sizeof bits);
        for (int i = 0; i < 8; i++) put(line - first + i * step_line, k + i * step_k, __uint_as_float(uint32_t(bits[i]) << 16));
    };
    if (across)
        for (int line = first; line < first + count; line += 8)
            for (int k = 0; k < 16; k++) eight(line, k, 1, 0);
    else
        for (int line = first; line < first + count; line++)
            for (int k = 0; k < 16; k += 8) eight(line, k, 0, 1);
}

void touch_operand(uint64_t descriptor, int first, int count, bool across, unsigned unit, uint32_t time, Site site) {
    if (descriptor >> 62 != swizzle_128) fail(site, "the descriptor is not of rows of 128 swizzled bytes");
    for (int line = first; line < first + count; line += across ? 8 : 1)
        for (int k = 0; k < 16; k += across ? 1 : 8) {
            const size_t at = chunk_at(descriptor, line, k, across);
            if (at + 16 > place.shared_bytes)
                fail(site, "the descriptor names shared bytes %zu to %zu of %u", at, at + 16, place.shared_bytes);
            race::touch_as(unit, time, place.shared + at, 16, false, site);
        }
}

void run(const WarpProduct& p, unsigned warp_in_group) {
    float a[16][16], b[16][256];
    if (p.from_registers) {
        for (int lane = 0; lane < int(warp_size); lane++)
            for (int i = 0; i < 4; i++)
                for (int h = 0; h < 2; h++) {
                    const uint32_t pair = p.registers[lane][i];
                    a[fragments::a_row(lane, i)][fragments::a_k(lane, i, h)] = __uint_as_float(h ? pair & 0xffff0000u : pair << 16);
                }
    } else {
        read_operand(p.a, int(16 * warp_in_group), 16, false, [&](int row, int k, float value) { a[row][k] = value; });
    }
    read_operand(p.b, 0, p.n, p.across, [&](int column, int k, float value) { b[k][column] = value; });
    float c[256];
    for (int row = 0; row < 16; row++) {
        const auto each = [&](auto f) {
            for (int column = 0; column < p.n; column++)
                f(c[column], p.d[row % 8 * 4 + column % 8 / 2][column / 8 * 4 + row / 8 * 2 + column % 2]);
        };
        each([](float& sum, float& d) { sum = d; });
        for (int k = 0; k < 16; k++)
            for (int column = 0; column < p.n; column++) c[column] += a[row][k] * b[k][column];
        each([](float& sum, float& d) { d = sum; });
    }
}

unsigned unit(const Warp& warp) { return race::unit_of_warp(unsigned(&warp - worker->warps)); }

Warp& own_warp(Site site) {
    if ((current->warp / 4 + 1) * 4 * warp_size > worker->thread_count) fail(site, "warp %u belongs to no whole warpgroup", current->warp);
    return worker->warps[current->warp];
}

void issue(unsigned, void* const* operands) {
    const auto& first = *static_cast<const WarpgroupProduct*>(operands[0]);
    const Site site = worker->self().waits_at;
    Warp& warp = own_warp(site);
    const unsigned warp_in_group = current->warp % 4;
    if (!warp.fenced) fail(site, "wgmma without a wgmma_fence since the last wait");
    WarpProduct p{{}, {}, first.registers != nullptr, first.a, first.b, first.n, first.across, warp.groups};
    for (unsigned lane = 0; lane < warp_size; lane++) {
        const auto& part = *static_cast<const WarpgroupProduct*>(operands[lane]);
        if (part.a != first.a || part.b != first.b) fail(site, "the lanes' operands of wgmma differ");
        p.d[lane] = part.d;
        if (p.from_registers) memcpy(p.registers[lane], part.registers, sizeof p.registers[lane]);
    }
    const auto time = uint32_t(warp.groups + 1);
    if (!p.from_registers) touch_operand(p.a, int(16 * warp_in_group), 16, false, unit(warp), time, site);
    touch_operand(p.b, 0, p.n, p.across, unit(warp), time, site);
    const Async mode = worker->configuration.async;
    const bool at_once = mode == Async::eager || (mode == Async::random && warp.products.empty() && worker->random() % 2);
    if (at_once) run(p, warp_in_group);
    else warp.products.push_back(p);
    warp.open = true;
}

} // namespace

uint64_t describe_swizzled(const void* tile, unsigned block, Site site) {
    const unsigned offset = shared_offset(tile, 16, site);
    if (offset % 1024) fail(site, "the tile of a wgmma descriptor is not at a multiple of 1024");
    if (block % 16 || block >= 1 << 18) fail(site, "a wgmma descriptor of blocks %u bytes apart", block);
    return uint64_t(offset >> 4) | uint64_t(block >> 4) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(swizzle_128) << 62;
}

void start_product(const WarpgroupProduct& product, Site site) {
    meet(whole_warp, Collective::wgmma, const_cast<WarpgroupProduct*>(&product), issue, site);
}

void fence_products(Site site) {
    if (mutation(site) == Mutation::left_out) return;
    const auto fence = [](unsigned, void* const*) { own_warp(worker->self().waits_at).fenced = true; };
    meet(whole_warp, Collective::wgmma_fence, nullptr, fence, site);
}

void commit_products(Site site) {
    if (mutation(site) == Mutation::left_out) return;
    const auto commit = [](unsigned, void* const*) {
        Warp& warp = own_warp(worker->self().waits_at);
        warp.groups++;
        warp.open = false;
    };
    meet(whole_warp, Collective::wgmma_commit, nullptr, commit, site);
}

void wait_for_products(unsigned newest_pending, Site site) {
    const Mutation change = mutation(site);
    if (change == Mutation::left_out) return;
    if (change == Mutation::one_short) newest_pending++;
    const auto wait = [](unsigned, void* const* operands) {
        Warp& warp = own_warp(worker->self().waits_at);
        const unsigned pending = *static_cast<const unsigned*>(operands[0]);
        const uint64_t limit = warp.groups > pending ? warp.groups - pending : 0;
        auto product = warp.products.begin();
        for (; product != warp.products.end() && product->group < limit; ++product) run(*product, current->warp % 4);
        warp.products.erase(warp.products.begin(), product);
        warp.waited = std::max(warp.waited, limit);
        warp.fenced = false;
        for (unsigned lane = 0; lane < warp_size; lane++)
            race::learn(current->warp * warp_size + lane, unit(warp), uint32_t(limit));
    };
    meet(whole_warp, Collective::wgmma_wait, &newest_pending, wait, site);
}

void set_registers(Site site) {
    const auto check = [](unsigned, void* const*) { own_warp(worker->self().waits_at); };
    meet(whole_warp, Collective::set_registers, nullptr, check, site);
}

} // namespace emulator
