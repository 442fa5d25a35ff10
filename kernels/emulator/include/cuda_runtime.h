// The CUDA C++ language and its built-in functions, as far as kernels use them, for a host compiler.
#pragma once
#include "emulator.h"
#include "vector_types.h"
#include <algorithm>
#include <array>
#include <cassert>
#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <math.h>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))

#define threadIdx (::emulator::current->index)
#define blockIdx (::emulator::place.block)
#define blockDim (::emulator::place.block_size)
#define gridDim (::emulator::place.grid)
constexpr int warpSize = 32;

#include "atomics.h"
#include "collectives.h"
#include "intrinsics.h"
