// Mutants: the kernels of one file may run without one of their barriers, waits, arrives, commits or fences, or with a
// weaker one, to find out whether a test notices (the script `mutants`).
//
//   ANABRANCH_EMU_MUTANT=linear:product.cuh:213         kernels of linear.cu do without the call at that line
//   ANABRANCH_EMU_MUTANT=linear:product.cuh:211:short   its wait leaves one group more in flight
//   ANABRANCH_EMU_MUTANT=linear:product.cuh:213:warp    its __syncthreads is one of each warp alone
//
// The twin of each such call asks `mutation` first, with the call's own site: a line has one such call.
#pragma once
#include "../include/emulator.h"

namespace emulator {

enum class Mutation { none, left_out, one_short, warp_alone };

/// What becomes of the call at `site` in the running launch.
Mutation mutation(Site site);
/// A launch of a kernel of `file` begins.
void start_mutation(const char* file);

} // namespace emulator
