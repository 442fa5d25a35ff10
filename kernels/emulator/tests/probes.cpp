// The emulator's own tests: twins against plain loops, and mistakes that must be reported by name.
// usage: probes [--race]; with --race the library is a race build, which finds more.
#include "device.h"
#include "numbers.h"
#include "probes_sm90.h"
#include <thread>

using namespace device;
using namespace numbers;

namespace {

bool race = false;

void equal(const std::vector<unsigned>& found, const std::vector<unsigned>& wanted, const char* what) {
    for (size_t i = 0; i < wanted.size(); i++)
        if (found[i] != wanted[i]) {
            printf("%s: element %zu is %u, expected %u\n", what, i, found[i], wanted[i]);
            check(false, what);
        }
}

/// The launch must fail and its text must contain `words`.
void caught(int result, const char* words) {
    if (!result || !strstr(emulator_last_error(), words)) printf("result %d, expected an error with \"%s\"\n", result, words);
    check(result && strstr(emulator_last_error(), words), "a mistake that must be reported");
}

void products() {
    const auto a = rows(1, 16, 16, 16, 1), b = rows(2, 8, 16, 16, 1);
    auto b_across = b;
    for (int n = 0; n < 8; n++)
        for (int k = 0; k < 16; k++) b_across[k * 8 + n] = b[n * 16 + k];
    Array<uint16_t> a_(a), b_(b), b_across_(b_across);
    Array<float> d_(128), d_across_(128), d_tf32_(128);
    check(!launch("probe_product", {1, 1, 32, 2048}, d_, d_across_, a_, b_, b_across_), "probe_product");
    const auto d = d_.read(), d_across = d_across_.read();
    Worst worst;
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 8; n++) {
            double sum = 0;
            for (int k = 0; k < 16; k++) sum += wide(a[m * 16 + k]) * wide(b[n * 16 + k]);
            worst.add(d[m * 8 + n], sum);
            worst.add(d_across[m * 8 + n], sum);
        }
    check(worst.error <= 1e-5, "mma.m16n8k16");

    const auto af = uniform(3, 128, 1), bf = uniform(4, 64, 1);
    Array<float> af_(af), bf_(bf);
    check(!launch("probe_product_tf32", {1, 1, 32, 0}, d_tf32_, af_, bf_), "probe_product_tf32");
    const auto d_tf32 = d_tf32_.read();
    worst = {};
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 8; n++) {
            double sum = 0;
            for (int k = 0; k < 8; k++) sum += double(af[m * 8 + k]) * bf[n * 8 + k];
            worst.add(d_tf32[m * 8 + n], sum);
        }
    check(worst.error <= 8 * 1e-3 && worst.error > 1e-6, "mma.m16n8k8 in tf32, and not in f32");
}

void warp_functions() {
    Array<unsigned> out(8 * 64);
    check(!launch("probe_warp", {1, 1, 64, 0}, out), "probe_warp");
    std::vector<unsigned> wanted;
    for (unsigned thread = 0; thread < 64; thread++) {
        const unsigned lane = thread % 32, within = lane % 16;
        wanted.insert(wanted.end(), {(lane + 1) % 32 * 10, lane ^ 5, within + 3 < 16 ? lane + 3 : lane, within < 3 ? lane : lane - 3,
                                     0x49249249u, 1, 31 * 16, lane < 16 ? 15 : unsigned(-31)});
    }
    equal(out.read(), wanted, "probe_warp");
}

void barriers() {
    Array<unsigned> out(256), named(64);
    std::vector<unsigned> reversed, taken;
    for (unsigned i = 0; i < 256; i++) reversed.push_back(255 - i);
    check(!launch("probe_exchange", {1, 1, 256, 4096}, out), "probe_exchange");
    equal(out.read(), reversed, "probe_exchange");
    check(!launch("probe_named", {1, 1, 64, 4096}, named), "probe_named");
    for (unsigned round = 0; round < 2; round++)
        for (unsigned lane = 0; lane < 32; lane++) taken.push_back(100 * round + 31 - lane);
    equal(named.read(), taken, "probe_named");

    int result = launch("probe_exchange_without_barrier", {1, 1, 256, 4096}, out);
    if (race) caught(result, "race: ");
    else check(out.read() != reversed, "a missing barrier gives wrong numbers in every order");
    caught(launch("probe_half_at_barrier", {1, 1, 64, 0}), "deadlock: threads 0..31 wait at a barrier (probes.cu:");
    caught(launch("probe_diverged_barrier", {1, 1, 64, 0}), "diverged");
    caught(launch("probe_wrong_mask", {1, 1, 32, 0}, out), "is not in its own mask 0000ffff");
}

void copies() {
    const auto in = uniform(1, 128, 1);
    Array<float> in_(in), out_(32), pairs_(256);
    for (const char* mode : {"eager", "lazy"}) {
        check(!emulator_configure(nullptr, mode, 0), mode);
        check(!launch("probe_copy_groups", {1, 1, 32, 4096}, pairs_, in_), "probe_copy_groups");
        const auto pairs = pairs_.read();
        for (size_t i = 0; i < 256; i++) check(pairs[i] == (i % 8 < 3 ? in[i / 8 * 4 + i % 8] : 0), "probe_copy_groups");
        const int result = launch("probe_copy_without_wait", {1, 1, 32, 4096}, out_, in_);
        if (race) caught(result, "(a copy in flight)");
        else check(!result && std::isnan(out_.read()[0]) == !strcmp(mode, "lazy"), "a missing wait shows in lazy mode");
        check(!launch("probe_copy_past_barrier", {1, 1, 32, 4096}, out_, in_, 1), "copies that were waited for before a barrier");
        if (race) caught(launch("probe_copy_past_barrier", {1, 1, 32, 4096}, out_, in_, 0), "(a copy in flight)");
    }
}

void memory() {
    Array<unsigned> small(10), out(1);
    check(out.read()[0] == 0xffffffffu, "fresh memory is NaN");
    check(!launch("probe_write", {1, 1, 1, 0}, small, 9ll), "probe_write");
    const char* past = race ? "write of 4 bytes at probes.cu:" : "a write outside an allocation of 40 bytes, at byte 40";
    caught(launch("probe_write", {1, 1, 1, 0}, small, 10ll), past);
    caught(launch("probe_write", {1, 1, 1, 0}, small, -1ll), race ? "at byte -4 of a buffer of 40" : "at byte -4");
    caught(launch("probe_write", {1, 1, 1, 0}, 0ull, 0ll), "which is no memory");
    check(!launch("probe_read", {1, 1, 1, 0}, out, small, 9ll), "probe_read");
    const int result = launch("probe_read", {1, 1, 1, 0}, out, small, 10ll);
    if (race) caught(result, "read of 4 bytes at probes.cu:");
    else check(std::isnan(float(wide(uint16_t(out.read()[0])))), "reading past an end gives NaN");
    caught(launch("probe_shared_write", {1, 1, 1, 4092}, 0u), "shared bytes 0 to 4096 of 4092");
    if (race) caught(launch("probe_shared_write", {1, 1, 1, 4096}, 1024u), "shared bytes 4096 to 4100 of 4096");
    caught(launch("probe_recursion", {1, 1, 64, 0}, 1 << 20), "which is no memory");
    unsigned value = 0;
    check(cuMemcpyDtoH_v2(&value, small.pointer + 37, 4) == 1, "a copy past an end is refused");
    check(launch("probe_exchange", {1, 1, 2048, 4096}, out) == 1, "a block of 2048 threads is refused");
    check(launch("probe_exchange", {1, 1, 32, 228 << 10}, out) == 1, "228 KiB of shared memory are refused");
    check(!launch("probe_overlap", {4, 1, 32, 0}, Array<unsigned>(128), 32), "blocks apart");
    Array<unsigned> overlap(128);
    const int overlapping = launch("probe_overlap", {4, 1, 32, 0}, overlap, 31);
    if (race) caught(overlapping, "of another block at probes.cu:");
}

/// What only the race detector sees.
void races() {
    Array<unsigned> out(256);
    for (const char* order : {"ascending", "highest-warp", "random"}) {
        check(!emulator_configure(order, "eager", 1), order);
        check(!launch("probe_bytes", {1, 1, 64, 0}, out, 1, 0), "neighbouring bytes");
        check(!launch("probe_count_from", {1, 1, 64, 0}, out, 1), "an atomic after a barrier");
        check(!launch("probe_flag", {2, 1, 1, 0}, out, out.pointer + 64, 0), "a flag");
        caught(launch("probe_bytes", {1, 1, 2, 0}, out, 0, 0), "race: write of byte 0 of a buffer");
        caught(launch("probe_bytes", {1, 1, 4, 0}, out, 1, 1), "race: write of byte ");
        caught(launch("probe_count_from", {1, 1, 64, 0}, out, 0), "race: write of byte 0");
        caught(launch("probe_flag", {2, 1, 1, 0}, out, out.pointer + 64, 1), "race: read of byte 0");
        caught(launch("probe_readers", {1, 1, 256, 4096}, out), "race: ");
        check(!launch("probe_widths", {1, 1, 16, 4096}, out, 1, 0), "narrow reads of a wide write");
        caught(launch("probe_widths", {1, 1, 16, 4096}, out, 0, 0), "race: ");
        caught(launch("probe_widths", {1, 1, 16, 4096}, out, 1, 1), "race: write of shared byte 2");
        const unsigned long long flags = out.pointer + 4 * 200;
        check(!launch("probe_chain", {4, 1, 32, 0}, out, flags, 0), "blocks that tell each other");
        caught(launch("probe_chain", {4, 1, 32, 0}, out, flags, 1), "of another block at probes.cu:");
    }
}

/// In the lazy mode work waits for a reason to be done, which shows who forgot to wait.
void streams() {
    for (const bool lazy : {false, true}) {
        check(!emulator_configure(nullptr, lazy ? "lazy" : "eager", 0), "mode");
        void *compute, *copies, *event;
        unsigned* pinned;
        check(!cuStreamCreate(&compute, 1) && !cuStreamCreate(&copies, 1) && !cuEventCreate(&event, 0), "streams");
        check(!cuMemHostAlloc(reinterpret_cast<void**>(&pinned), 4, 0), "pinned memory");
        Array<unsigned> counter(1);

        pinned[0] = 5;
        check(!cuMemcpyHtoDAsync_v2(counter.pointer, pinned, 4, copies), "copy");
        if (lazy) pinned[0] = 7; // too early: the copy takes this value
        check(!cuEventRecord(event, copies) && !cuStreamWaitEvent(compute, event, 0), "event");
        check(!launch("probe_count", {1, 1, 64, 0, compute}, counter), "probe_count");
        check(!cuMemcpyDtoHAsync_v2(pinned, counter.pointer, 4, compute), "copy back");
        check(pinned[0] == (lazy ? 7 : 69), "not waited for");
        check(!cuStreamSynchronize(compute), "synchronize");
        check(pinned[0] == (lazy ? 71 : 69), "waited for, in the order of the event");

        unsigned pageable = 3;
        check(!cuMemcpyHtoDAsync_v2(counter.pointer, &pageable, 4, copies), "copy of pageable memory");
        pageable = 4; // which has been read
        check(!launch("probe_count", {1, 1, 1, 0, compute}, counter), "probe_count"); // not ordered behind the copy
        check(!cuStreamSynchronize(compute) && !cuEventRecord(event, copies) && !cuEventSynchronize(event), "synchronize");
        check(counter.read()[0] == (lazy ? 3 : 4), "two streams without an event");
        if (lazy) {
            check(!launch("probe_half_at_barrier", {1, 1, 64, 0, compute}), "an error comes later");
            check(cuStreamSynchronize(compute) == 719 && !cuStreamSynchronize(compute), "an error comes once");
        }
        cuEventDestroy_v2(event);
        check(!cuStreamDestroy_v2(compute) && !cuStreamDestroy_v2(copies) && !cuMemFreeHost(pinned), "the end");
    }
}

void host_threads() {
    Array<unsigned> counter(std::vector<unsigned>{0});
    std::vector<std::thread> threads;
    for (int i = 0; i < 8; i++)
        threads.emplace_back([&, i] {
            check(!emulator_configure(i % 2 ? "random" : "descending", nullptr, uint64_t(i)), "configuration");
            for (int repeat = 0; repeat < 20; repeat++) {
                Array<unsigned> out(256);
                check(!launch("probe_exchange", {1, 1, 256, 4096}, out), "probe_exchange from many host threads");
                check(!launch("probe_count", {5, 1, 64, 0}, counter), "probe_count");
            }
        });
    for (auto& thread : threads) thread.join();
    check(counter.read()[0] == 8 * 20 * 5 * 64, "atomics from many host threads");
}

} // namespace

int main(int count, char** arguments) {
    race = count > 1 && !strcmp(arguments[1], "--race");
    check(emulator_configure("sideways", nullptr, 0) != 0, "an order that does not exist");
    for (const char* order : {"ascending", "descending", "random", "highest-warp"}) {
        for (const char* mode : {"eager", "lazy", "random"}) {
            check(!emulator_configure(order, mode, 1), order);
            products();
            warp_functions();
            barriers();
            hopper::probes();
        }
        copies();
        for (const char* mode : {"eager", "lazy"}) {
            check(!emulator_configure(nullptr, mode, 0), mode);
            hopper::mistakes(race, !strcmp(mode, "lazy"));
        }
    }
    hopper::maps();
    memory();
    if (race) races();
    streams();
    host_threads();
    printf("all probes passed%s\n", race ? " with the race detector" : "");
}
