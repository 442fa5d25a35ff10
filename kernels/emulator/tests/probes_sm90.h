// Probes of mbarriers, copies of tiles and wgmma (probes_sm90.cu): layouts against plain loops, and mistakes.
#pragma once
#include "numbers.h"
#include "tensor_map.h"

namespace hopper {

using namespace device;
using namespace numbers;

/// The launch must fail with these words, or where there are none, succeed.
inline void expect_error(const char* what, int result, const char* words) {
    const bool good = words ? result && strstr(emulator_last_error(), words) : !result;
    if (!good) printf("%s: result %d, expected %s%s\n", what, result, words ? "an error with " : "none", words ? words : "");
    check(good, what);
}

/// Chunks of 16 bytes permuted by row; zero outside of the matrix on every side.
inline void boxes() {
    const int rows_of_x = 70, width = 100, ld = 104;
    const auto x = rows(1, rows_of_x, width, ld, 1);
    Array<uint16_t> x_(x), out_(64 * 64);
    const TensorMap map = tensor_map(x_.pointer, rows_of_x, width, ld, 64);
    const int places[][2] = {{0, 0}, {64, 3}, {40, 10}, {-5, -7}, {96, 69}, {100, 0}, {0, 70}, {-64, 0}, {3, -64}, {1 << 30, 1 << 30}};
    for (const auto& [column0, row0] : places) {
        check(!launch("probe_box", {1, 1, 64, own_struct}, out_, map, column0, row0, 64 * 64 * 2), "probe_box");
        const auto out = out_.read();
        for (int r = 0; r < 64; r++)
            for (int c = 0; c < 64; c++) {
                const int row = row0 + r, column = column0 + c;
                const bool exists = row >= 0 && row < rows_of_x && column >= 0 && column < width;
                const uint16_t found = out[r * 64 + (c / 8 ^ r % 8) * 8 + c % 8];
                check(found == (exists ? x[row * ld + column] : 0), "a box's element");
            }
    }
}

inline void products(const char* name, int n, bool across) {
    const auto a = rows(1, 64, 64, 64, 1), b = rows(2, n, 64, 64, 1);
    auto stored = b;
    if (across)
        for (int column = 0; column < n; column++)
            for (int k = 0; k < 64; k++) stored[size_t(k) * n + column] = b[size_t(column) * 64 + k];
    Array<uint16_t> a_(a), b_(stored);
    const TensorMap map_a = tensor_map(a_.pointer, 64, 64, 64, 64);
    const TensorMap map_b = across ? tensor_map(b_.pointer, 64, n, n, 64) : tensor_map(b_.pointer, n, 64, 64, 64);
    for (int registers = 0; registers < (n > 128 ? 1 : 2); registers++) {
        Array<float> out_(size_t(64) * n);
        check(!launch(name, {1, 1, 128, own_struct}, out_, a_, map_a, map_b, registers), name);
        const auto out = out_.read();
        Worst worst;
        for (int row = 0; row < 64; row++)
            for (int column = 0; column < n; column++) {
                double sum = 0;
                for (int k = 0; k < 64; k++) sum += 2 * wide(a[row * 64 + k]) * wide(b[size_t(column) * 64 + k]);
                worst.add(out[size_t(row) * n + column], sum);
            }
        check(worst.error <= 1e-5, name);
    }
}

/// What a mistake leads to, without and with the race detector; null for a right result, "wrong" for a wrong one or any error.
struct Mistake {
    int number;
    const char *eager, *lazy, *race;
};

inline void mistakes(bool race, bool lazy) {
    const Mistake all[] = {
        {0, nullptr, nullptr, nullptr},
        {1, "is not a multiple of 128", "is not a multiple of 128", "is not a multiple of 128"},
        {2, "there is no mbarrier at shared byte 16384", "there is no mbarrier", "there is no mbarrier"},
        {3, "lacks 1 arrivals and 0 bytes", "lacks 1 arrivals and 0 bytes", "lacks 1 arrivals"},
        {4, "did not fence it for copies (fence_proxy_async)", "did not fence it", "did not fence it"},
        {5, nullptr, nullptr, "race: read of shared byte 163"},
        {6, "wrong", "wrong", "wrong"},
        {7, "lacks 1 arrivals and -8192 bytes", "lacks 1 arrivals and -8192 bytes", "lacks 1 arrivals and -8192 bytes"},
        {8, "lacks 0 arrivals and 16 bytes", "lacks 0 arrivals and 16 bytes", "lacks 0 arrivals and 16 bytes"},
        {9, "wrong", "wrong", "race: "},
        {10, nullptr, nullptr, "without a fence_proxy_async"},
        {11, nullptr, nullptr, nullptr},
        {12, "wgmma without a wgmma_fence", "wgmma without a wgmma_fence", "wgmma without a wgmma_fence"},
        {13, "a wgmma that it never committed", "a wgmma that it never committed", "unordered read by wgmma of warp"},
        {14, nullptr, "wrong", "unordered read by wgmma of warp"},
        {15, "without having waited for its last wgmma", "without having waited for its last wgmma", "unordered read by wgmma of warp"},
        {16, "lacks no arrival in this phase", "lacks no arrival in this phase", "lacks no arrival in this phase"},
    };
    const auto x = rows(1, 128, 64, 64, 1);
    Array<uint16_t> x_(x);
    const TensorMap map = tensor_map(x_.pointer, 128, 64, 64, 64);
    for (const Mistake& m : all) {
        Array<float> out_(64 * 64);
        const int result = launch("probe_mistake", {1, 1, 160, own_struct}, out_, map, m.number);
        const char* words = race ? m.race : lazy ? m.lazy : m.eager;
        const std::string what = "probe_mistake " + std::to_string(m.number);
        const bool wrong = words && !strcmp(words, "wrong");
        if (wrong && result) continue;
        // Without __syncthreads some orders find no mbarrier.
        if (m.number == 5 && result && strstr(emulator_last_error(), "there is no mbarrier")) continue;
        expect_error(what.c_str(), result, wrong ? nullptr : words);
        if (result) continue;
        const auto out = out_.read();
        Worst worst;
        for (int row = 0; row < 64; row++)
            for (int column = 0; column < 64; column++) {
                double sum = 0;
                for (int box = 0; box < 128; box += 64)
                    for (int k = 0; k < 64; k++) sum += wide(x[(box + row) * 64 + k]) * wide(x[(box + column) * 64 + k]);
                worst.add(out[row * 64 + column], sum);
            }
        check((worst.error <= 1e-5) == !wrong, what.c_str());
    }
    TensorMap none{};
    Array<float> out_(64 * 64);
    expect_error("no map", launch("probe_mistake", {1, 1, 160, own_struct}, out_, none, 0), "no tensor map");
}

/// The driver refuses what the hardware cannot do.
inline void maps() {
    Array<uint16_t> x_(64 * 64);
    TensorMap map;
    check(!encode(map, x_.pointer, 64, 64, 64, 64), "a map");
    expect_error("base", encode(map, x_.pointer + 8, 64, 64, 64, 64), "the address is not a multiple of 16");
    expect_error("stride", encode(map, x_.pointer, 64, 60, 60, 64), "a stride of 120 bytes");
    expect_error("box", encode(map, x_.pointer, 64, 64, 64, 257), "the box has 257 elements of dimension 1");
    expect_error("span", encode(map, x_.pointer, 64, 128, 128, 64, 72), "rows of the box have 144 bytes, the swizzle is of 128");
    expect_error("row", encode(map, x_.pointer, 64, 64, 64, 64, 4), "rows of the box have 8 bytes, not a multiple of 16");
    expect_error("size", encode(map, x_.pointer, 0, 64, 64, 64), "dimension 1 has 0 elements");
}

inline void probes() {
    boxes();
    for (const bool across : {false, true})
        for (const int n : {64, 128, 256})
            products(("probe_wgmma_" + std::to_string(n) + (across ? "_across" : "")).c_str(), n, across);
}

} // namespace hopper
