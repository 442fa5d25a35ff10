// Random inputs, bf16 on the host, and the comparison that every kernel test ends with.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

namespace numbers {

inline double wide(uint16_t bits) {
    uint32_t u = uint32_t(bits) << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
inline uint16_t narrow(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

/// Values of (-scale, scale), the same for the same seed.
inline std::vector<float> uniform(uint64_t seed, size_t count, float scale) {
    std::vector<float> values(count);
    for (float& v : values) {
        seed = seed * 6364136223846793005ULL + 1442695040888963407ULL;
        v = scale * float(int32_t(seed >> 32)) / 2147483648.0f;
    }
    return values;
}

/// Rows of `width` bf16 values with NaN in the padding up to `ld`.
inline std::vector<uint16_t> rows(uint64_t seed, int count, int width, int ld, float scale) {
    std::vector<uint16_t> values(size_t(count) * ld, 0xffff);
    const auto source = uniform(seed, size_t(count) * width, scale);
    for (int r = 0; r < count; r++)
        for (int c = 0; c < width; c++) values[size_t(r) * ld + c] = narrow(source[size_t(r) * width + c]);
    return values;
}

/// Largest |found - wanted| / (1 + |wanted|), infinite once anything was NaN.
struct Worst {
    double error = 0;
    void add(double found, double wanted) {
        const double e = std::fabs(found - wanted) / (1 + std::fabs(wanted));
        error = std::isnan(e) ? INFINITY : std::fmax(error, e);
    }
};

} // namespace numbers
