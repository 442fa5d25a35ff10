// Error names, and the text of each host thread's last error.
#include "errors.h"
#include <cstdio>

namespace emulator {

namespace {

thread_local std::string last_error;

struct Name {
    int result;
    const char* name;
    const char* text;
};
constexpr Name names[] = {
    {success, "CUDA_SUCCESS", "no error"},
    {invalid_value, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {out_of_memory, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {not_initialized, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {no_device, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {invalid_device, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {invalid_context, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {invalid_handle, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {not_found, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {not_ready, "CUDA_ERROR_NOT_READY", "device not ready"},
    {illegal_address, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {launch_failed, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {not_supported, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
};

const Name* find(int result) {
    for (const Name& name : names)
        if (name.result == result) return &name;
    return nullptr;
}

} // namespace

Result report(Result result, const std::string& text) {
    last_error = text;
    fprintf(stderr, "emulator: %s\n", text.c_str());
    return result;
}

} // namespace emulator

extern "C" {

/// The text of the calling host thread's last error, valid until its next one.
const char* emulator_last_error() { return emulator::last_error.c_str(); }

int cuGetErrorName(int result, const char** text) {
    const auto* name = emulator::find(result);
    *text = name ? name->name : nullptr;
    return name ? emulator::success : emulator::invalid_value;
}

int cuGetErrorString(int result, const char** text) {
    const auto* name = emulator::find(result);
    *text = name ? name->text : nullptr;
    return name ? emulator::success : emulator::invalid_value;
}
}
