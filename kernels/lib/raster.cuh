// In which order a grid of tiles is worked on.
#pragma once

/// The tile's place in a grid of `down` × `across` tiles, numbered so that blocks that run at a time share operands:
/// strips of eight tiles down, columns first.
struct Place {
    int down, across;
};
__device__ __forceinline__ Place raster(int index, int down, int across) {
    constexpr int STRIP = 8;
    const int strip = index / (STRIP * across), within = index % (STRIP * across);
    const int height = min(down - strip * STRIP, STRIP);
    return {strip * STRIP + within % height, within / height};
}
