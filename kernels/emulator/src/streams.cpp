// The driver's entry points for streams and events. Everything has happened when a call returns; the clock is the host's.
#include "errors.h"
#include "memory.h"
#include <chrono>

using namespace emulator;

namespace {

struct Stream {
    unsigned flags;
};

struct Event {
    std::chrono::steady_clock::time_point at;
    bool recorded = false;
};

Result synchronize() {
    std::string error = check_guards();
    return error.empty() ? success : report(illegal_address, "synchronize: " + error);
}

} // namespace

extern "C" {

int cuCtxSynchronize() { return synchronize(); }

int cuStreamCreate(void** stream, unsigned flags) { return *stream = new Stream{flags}, success; }
int cuStreamCreateWithPriority(void** stream, unsigned flags, int) { return cuStreamCreate(stream, flags); }
int cuStreamDestroy_v2(void* stream) { return delete static_cast<Stream*>(stream), success; }
int cuStreamSynchronize(void*) { return synchronize(); }
int cuStreamQuery(void*) { return success; }
int cuStreamWaitEvent(void*, void*, unsigned) { return success; }

int cuLaunchHostFunc(void*, void (*function)(void*), void* argument) { return function(argument), success; }

int cuEventCreate(void** event, unsigned) { return *event = new Event, success; }
int cuEventDestroy_v2(void* event) { return delete static_cast<Event*>(event), success; }
int cuEventRecord(void* event, void*) {
    auto& e = *static_cast<Event*>(event);
    e.at = std::chrono::steady_clock::now();
    e.recorded = true;
    return success;
}
int cuEventSynchronize(void*) { return synchronize(); }
int cuEventQuery(void*) { return success; }
int cuEventElapsedTime_v2(float* milliseconds, void* start, void* end) {
    auto &from = *static_cast<Event*>(start), &to = *static_cast<Event*>(end);
    if (!from.recorded || !to.recorded) return invalid_handle;
    *milliseconds = std::chrono::duration<float, std::milli>(to.at - from.at).count();
    return success;
}
int cuEventElapsedTime(float* milliseconds, void* start, void* end) { return cuEventElapsedTime_v2(milliseconds, start, end); }

// Graphs do not exist here, which callers must live with: they launch one by one.
int cuStreamIsCapturing(void*, int* status) { return *status = 0, success; }
int cuStreamBeginCapture_v2(void*, int) { return not_supported; }
int cuStreamEndCapture(void*, void**) { return not_supported; }
int cuGraphInstantiateWithFlags(void**, void*, unsigned long long) { return not_supported; }
int cuGraphLaunch(void*, void*) { return not_supported; }
int cuGraphUpload(void*, void*) { return not_supported; }
int cuGraphExecDestroy(void*) { return not_supported; }
int cuGraphDestroy(void*) { return not_supported; }
}
