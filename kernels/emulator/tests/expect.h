// What a kernel's test ends with.
#pragma once
#include "device.h"
#include "numbers.h"

constexpr double bf16_tolerance = 1.0 / 256; // half a unit in the last place, and the f32 sums before it

/// A leading dimension with at least eight columns of padding.
inline int padded(int width) { return (width + 7) / 8 * 8 + 8; }

inline void expect(const char* name, int rows, int width, int result, double error, double tolerance) {
    printf("%-14s %4d x %-5d error %.1e\n", name, rows, width, error);
    device::check(!result, name);
    device::check(error <= tolerance, name);
}
