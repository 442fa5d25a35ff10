// A launch borrows a worker, so that as many launches run at once as there are host threads that launch.
#include "launch.h"
#include "fault.h"
#include "mutation.h"
#include "race.h"
#include "worker.h"
#include <memory>
#include <mutex>

namespace emulator {

namespace {

std::mutex idle_lock;
std::vector<std::unique_ptr<Worker>>& idle() {
    static std::vector<std::unique_ptr<Worker>> workers;
    return workers;
}

std::unique_ptr<Worker> borrow() {
    std::lock_guard<std::mutex> guard(idle_lock);
    if (idle().empty()) return std::make_unique<Worker>();
    auto last = std::move(idle().back());
    idle().pop_back();
    return last;
}

void give_back(std::unique_ptr<Worker> borrowed) {
    std::lock_guard<std::mutex> guard(idle_lock);
    idle().push_back(std::move(borrowed));
}

} // namespace

std::string launch(const Kernel& kernel, Index grid, Index block, unsigned shared_bytes, void** arguments, Configuration how) {
    std::unique_ptr<Worker> borrowed = borrow();
    Worker& w = *borrowed;
    worker = &w;
    w.configuration = how;
    w.kernel = &kernel;
    w.arguments = arguments;
    w.error.clear();
    place = {{}, block, grid, w.shared, shared_bytes};
    start_mutation(kernel.file);
    FaultHandler faults;
    race::start_launch();
    bool good = true;
    for (unsigned z = 0; z < grid.z && good; z++)
        for (unsigned y = 0; y < grid.y && good; y++)
            for (unsigned x = 0; x < grid.x && good; x++) good = w.run_block({x, y, z});
    worker = nullptr;
    std::string error = w.error;
    give_back(std::move(borrowed));
    return error;
}

} // namespace emulator
