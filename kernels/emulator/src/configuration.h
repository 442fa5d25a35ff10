// In which order threads run and when asynchronous copies land.
#pragma once
#include <cstdint>

namespace emulator {

enum class Order { ascending, descending, random, highest_warp };
enum class Async { eager, lazy, random };

struct Configuration {
    Order order;
    Async async;
    uint64_t seed;
};

/// Of the calling host thread: what `emulator_configure` set, else the environment's ANABRANCH_EMU_ORDER,
/// ANABRANCH_EMU_ASYNC and ANABRANCH_EMU_SEED, else ascending, eager, 0.
Configuration& configuration();

} // namespace emulator
