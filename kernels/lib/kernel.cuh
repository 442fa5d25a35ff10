// What every kernel file includes first: the two macros that a kernel is declared with.
//
//   struct Shared { float sums[8]; };                       // all of the kernel's shared memory
//   extern "C" __global__ void __launch_bounds__(256) name(out, in, sizes, scalars) { SHARED(Shared, shared); … }
//   KERNEL(name)                                            // after the function: its name and parameters for the emulator
//   KERNEL_SHARED(name, Shared)                             // `unsigned name_shared_bytes`, which the launcher can read
//
// Dynamic shared memory is never initialised. A struct may be followed by as many bytes as the launch asks for.
#pragma once
#include <cuda_bf16.h>
#include <cstdint>

// Bytes of shared memory that a block can have: on 8.6, 8.9 and 12.0, which have the least, or what a file for one device
// says before it includes this.
#ifndef SHARED_MOST
#define SHARED_MOST 101376
#endif
#define SHARED_FITS(Struct) static_assert(sizeof(Struct) <= SHARED_MOST, "more shared memory than some device has");

using bf16 = __nv_bfloat16;

#if defined(__CUDACC__)
#define KERNEL(name)
#define KERNEL_SHARED(name, Struct)                                                                                    \
    SHARED_FITS(Struct)                                                                                                \
    extern "C" __device__ unsigned name##_shared_bytes = sizeof(Struct);
#define SHARED(Struct, name)                                                                                           \
    extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];                                           \
    Struct& name = *reinterpret_cast<Struct*>(dynamic_shared_memory)
#else
#include <kernel_twins.h>
#endif
