// Source lines of machine addresses, for reports.
#pragma once
#include <cstdint>
#include <string>

namespace emulator {

/// Offset of a code address in this library.
uint32_t library_offset(const void* address);
/// `rows.cuh:12 in rms_norm.cu:30`: the line and where it was inlined, without the emulator's own headers; the offset in hexadecimal
/// if addr2line is missing.
std::string source_lines(uint32_t offset);

} // namespace emulator
