// The driver's error codes that the emulator returns, and the text behind the last one.
#pragma once
#include <string>

namespace emulator {

enum Result : int {
    success = 0,
    invalid_value = 1,
    out_of_memory = 2,
    not_initialized = 3,
    no_device = 100,
    invalid_device = 101,
    invalid_context = 201,
    invalid_handle = 400,
    not_found = 500,
    not_ready = 600,
    illegal_address = 700,
    launch_failed = 719,
    not_supported = 801,
};

/// Prints the text to stderr and keeps it for `emulator_last_error`; returns `result`.
Result report(Result result, const std::string& text);

} // namespace emulator
