// The configuration of each launching host thread, from the environment or set by a test.
#include "configuration.h"
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulator {

namespace {

constexpr const char* orders[] = {"ascending", "descending", "random", "highest-warp"};
constexpr const char* asyncs[] = {"eager", "lazy", "random"};

template <size_t n>
int index_of(const char* value, const char* const (&names)[n]) {
    for (size_t i = 0; i < n; i++)
        if (!strcmp(value, names[i])) return int(i);
    return -1;
}

template <size_t n>
int from_environment(const char* variable, const char* const (&names)[n]) {
    const char* value = getenv(variable);
    if (!value || !*value) return 0;
    int index = index_of(value, names);
    if (index >= 0) return index;
    fprintf(stderr, "emulator: %s is \"%s\", expected one of", variable, value);
    for (const char* name : names) fprintf(stderr, " %s", name);
    fprintf(stderr, "\n");
    exit(2);
}

Configuration environment() {
    const char* seed = getenv("ANABRANCH_EMU_SEED");
    return {Order(from_environment("ANABRANCH_EMU_ORDER", orders)), Async(from_environment("ANABRANCH_EMU_ASYNC", asyncs)),
            seed ? strtoull(seed, nullptr, 10) : 0};
}

} // namespace

Configuration& configuration() {
    thread_local Configuration of_this_thread = environment();
    return of_this_thread;
}

} // namespace emulator

/// Sets the calling host thread's order and mode by name, null for unchanged; 0, or 1 for a name that does not exist.
extern "C" int emulator_configure(const char* order, const char* async, uint64_t seed) {
    using namespace emulator;
    Configuration next = configuration();
    if (order) {
        int index = index_of(order, orders);
        if (index < 0) return 1;
        next.order = Order(index);
    }
    if (async) {
        int index = index_of(async, asyncs);
        if (index < 0) return 1;
        next.async = Async(index);
    }
    next.seed = seed;
    configuration() = next;
    return 0;
}
