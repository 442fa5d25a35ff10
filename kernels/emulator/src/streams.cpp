// The queues of streams, and the driver's entry points for streams and events. The clock is the host's.
//
// Blocking streams are the default stream here. Whether a queue runs is decided by the host thread that adds to it, and
// a queue runs under one lock for all; the eager mode runs work without it.
#include "streams.h"
#include "configuration.h"
#include <chrono>
#include <deque>
#include <memory>
#include <mutex>
#include <set>
#include <utility>

using namespace emulator;

namespace {

using Clock = std::chrono::steady_clock;

struct Stream {
    std::deque<std::function<Result()>> work;
    Result error = success; // the first since the last wait
};

/// One recording of an event.
struct Record {
    Stream* stream;
    bool done = false;
    Clock::time_point at;
};

struct Event {
    std::shared_ptr<Record> record;
};

constexpr unsigned non_blocking = 1;

std::recursive_mutex lock;
std::set<Stream*>& streams() {
    static std::set<Stream*> all;
    return all;
}

Stream& stream_of(void* handle) {
    static Stream by_default;
    std::lock_guard<std::recursive_mutex> guard(lock);
    auto* stream = static_cast<Stream*>(handle);
    if (streams().count(stream)) return *stream;
    streams().insert(&by_default);
    return by_default;
}

/// Does the oldest work of the stream.
void step(Stream& stream) {
    auto work = std::move(stream.work.front());
    stream.work.pop_front();
    const Result result = work();
    if (stream.error == success) stream.error = result;
}

void run(Stream& stream) {
    while (!stream.work.empty()) step(stream);
}

Result finish(Stream& stream) {
    run(stream);
    return std::exchange(stream.error, success);
}

void complete(const Record& record) {
    while (!record.done && !record.stream->work.empty()) step(*record.stream);
}

bool coin() {
    thread_local uint64_t state = configuration().seed + 1;
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    return state >> 63;
}

} // namespace

namespace emulator {

bool deferred() { return configuration().async != Async::eager; }

Result in_stream(void* handle, std::function<Result()> work) {
    Stream& stream = stream_of(handle);
    std::unique_lock<std::recursive_mutex> guard(lock);
    const bool wait = configuration().async == Async::lazy || (configuration().async == Async::random && coin());
    if (!wait && stream.work.empty()) {
        guard.unlock();
        return work();
    }
    stream.work.push_back(std::move(work));
    return wait ? success : ::finish(stream);
}

Result finish(void* handle) {
    Stream& stream = stream_of(handle);
    std::lock_guard<std::recursive_mutex> guard(lock);
    return ::finish(stream);
}

void run_all() {
    std::lock_guard<std::recursive_mutex> guard(lock);
    for (Stream* stream : streams()) run(*stream);
}

Result finish_all() {
    std::lock_guard<std::recursive_mutex> guard(lock);
    Result first = success;
    for (Stream* stream : streams())
        if (Result result = ::finish(*stream); first == success) first = result;
    return first;
}

} // namespace emulator

extern "C" {

int cuCtxSynchronize() { return finish_all(); }

int cuStreamCreate(void** handle, unsigned flags) {
    if (!(flags & non_blocking)) return *handle = &stream_of(nullptr), success;
    auto* stream = new Stream;
    std::lock_guard<std::recursive_mutex> guard(lock);
    streams().insert(stream);
    return *handle = stream, success;
}
int cuStreamCreateWithPriority(void** handle, unsigned flags, int) { return cuStreamCreate(handle, flags); }

int cuStreamDestroy_v2(void* handle) {
    Stream* stream = &stream_of(handle);
    std::lock_guard<std::recursive_mutex> guard(lock);
    run(*stream);
    if (stream == &stream_of(nullptr)) return success;
    streams().erase(stream);
    delete stream;
    return success;
}

int cuStreamSynchronize(void* handle) { return finish(handle); }

/// Who asks often enough gets an end.
int cuStreamQuery(void* handle) {
    Stream& stream = stream_of(handle);
    std::lock_guard<std::recursive_mutex> guard(lock);
    if (stream.work.empty()) return finish(stream);
    step(stream);
    return not_ready;
}

int cuStreamWaitEvent(void* handle, void* event, unsigned) {
    auto record = static_cast<Event*>(event)->record;
    if (!record) return success; // an event that was never recorded holds nobody
    return in_stream(handle, [record] {
        std::lock_guard<std::recursive_mutex> guard(lock);
        return complete(*record), success;
    });
}

int cuLaunchHostFunc(void* handle, void (*function)(void*), void* argument) {
    return in_stream(handle, [=] { return function(argument), success; });
}

int cuEventCreate(void** event, unsigned) { return *event = new Event, success; }
int cuEventDestroy_v2(void* event) { return delete static_cast<Event*>(event), success; }

int cuEventRecord(void* event, void* handle) {
    auto record = std::make_shared<Record>();
    record->stream = &stream_of(handle);
    static_cast<Event*>(event)->record = record;
    return in_stream(handle, [record] {
        record->at = Clock::now();
        record->done = true;
        return success;
    });
}
int cuEventRecordWithFlags(void* event, void* handle, unsigned) { return cuEventRecord(event, handle); }

int cuEventSynchronize(void* event) {
    auto record = static_cast<Event*>(event)->record;
    if (!record) return success;
    std::lock_guard<std::recursive_mutex> guard(lock);
    if (record->done) return success;
    complete(*record);
    return std::exchange(record->stream->error, success);
}

int cuEventQuery(void* event) {
    auto record = static_cast<Event*>(event)->record;
    if (!record || record->done) return success;
    std::lock_guard<std::recursive_mutex> guard(lock);
    if (!record->stream->work.empty()) step(*record->stream);
    return not_ready;
}

int cuEventElapsedTime_v2(float* milliseconds, void* start, void* end) {
    auto from = static_cast<Event*>(start)->record, to = static_cast<Event*>(end)->record;
    if (!from || !to) return invalid_handle;
    if (!from->done || !to->done) return not_ready;
    *milliseconds = std::chrono::duration<float, std::milli>(to->at - from->at).count();
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
