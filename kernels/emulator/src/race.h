// What the scheduler tells the race detector (race.cpp); nothing unless the library is built with --race.
#pragma once
#include <cstddef>

namespace emulator::race {

#if defined(EMULATOR_RACE)
void start_launch();
void start_block(unsigned threads);
/// All threads of the block, or of a mask of a warp, know of each other's past from here on.
void join_warp(unsigned warp, unsigned mask);
/// The current thread publishes its past in `object`; another that acquires it knows of it.
void release(const void* object);
void acquire(const void* object);
void forget(const void* object);
/// The current thread reads or writes memory in a twin.
void touch(const void* pointer, size_t bytes, bool write);
#else
inline void start_launch() {}
inline void start_block(unsigned) {}
inline void join_warp(unsigned, unsigned) {}
inline void release(const void*) {}
inline void acquire(const void*) {}
inline void forget(const void*) {}
inline void touch(const void*, size_t, bool) {}
#endif

} // namespace emulator::race
