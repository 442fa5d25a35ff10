// The management library's entry points that tell a process's memory; libnvidia-ml.so.1 is another name of the driver's
// file. It answers where ANABRANCH_EMU_NVML is set: on many devices, Jetson's among them, there is none.
#include "memory.h"
#include <cstdlib>
#include <unistd.h>

namespace {

enum Answer : int { good = 0, driver_not_loaded = 9, not_enough_room = 7, bad_argument = 2 };

struct ProcessInfo {
    unsigned pid;
    unsigned long long used;
    unsigned gpu_instance, compute_instance;
};

} // namespace

extern "C" {

int nvmlInit_v2() {
    const char* told = getenv("ANABRANCH_EMU_NVML");
    return told && *told ? good : driver_not_loaded;
}
int nvmlShutdown() { return good; }
const char* nvmlErrorString(int) { return "emulated"; }
int nvmlDeviceGetCount_v2(unsigned* count) { return *count = 1, good; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** device) {
    static int token;
    return *device = &token, index == 0 ? good : bad_argument;
}

/// This process alone; a caller without room is told how much it needs.
int nvmlDeviceGetComputeRunningProcesses_v3(void*, unsigned* count, ProcessInfo* processes) {
    const bool room = processes && *count > 0;
    *count = 1;
    if (!room) return not_enough_room;
    const unsigned none = ~0u;
    processes[0] = {unsigned(getpid()), emulator::total_memory() - emulator::free_memory(), none, none};
    return good;
}
}
