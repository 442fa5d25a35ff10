// Runs a grid.
#pragma once
#include "../include/emulator.h"
#include "configuration.h"
#include <string>

namespace emulator {

/// Runs every block of the grid, one after the other; the error text, empty if all went well.
std::string launch(const Kernel& kernel, Index grid, Index block, unsigned shared_bytes, void** arguments, Configuration how);

} // namespace emulator
