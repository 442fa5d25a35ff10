// What the scheduler and the twins tell the race detector (race.cpp); nothing unless the library is built with --race.
#pragma once
#include "../include/emulator.h"

namespace emulator::race {

#if defined(EMULATOR_RACE)
void start_launch();
void start_block(unsigned threads, unsigned warps);
/// These threads, which wait for each other, know of each other's past and of what `object` publishes from here on; it
/// starts afresh. Nothing is published by null.
void join(const unsigned* threads, unsigned count, const void* object);
/// The current thread adds its past to what `object` publishes; it learns that; the object starts afresh.
void release(const void* object);
void acquire(const void* object);
void forget(const void* object);
/// The current thread reads or writes memory in a twin.
void touch(const void* pointer, size_t bytes, bool write, Site site);
/// What works beside the threads and has times of its own: the tensor cores of a warp, the copies of an mbarrier.
unsigned unit_of_warp(unsigned warp);
unsigned unit_of_mbarrier(unsigned number);
/// A unit reads or writes from now on, started by the current thread; who has learned its time knows of it. What a thread
/// wrote in shared memory it must have fenced.
void touch_as(unsigned unit, uint32_t time, const void* pointer, size_t bytes, bool write, Site site);
void learn(unsigned thread, unsigned unit, uint32_t time);
/// What the current thread has written in shared memory is for units too.
void fence_proxy();
/// An asynchronous copy writes there from now on, until it has landed and its own thread has waited.
void begin_async(const void* pointer, size_t bytes, Site site);
void end_async(const void* pointer, size_t bytes, Site site);
/// A relaxed atomic access: it does not race with other atomic ones, and orders nothing.
void atomic(const void* pointer, size_t bytes, Site site);
/// The current thread's past, and what it knows of other blocks, is known to who acquires the flag later, in any block.
void release_flag(const void* pointer);
void acquire_flag(const void* pointer);
#else
inline void start_launch() {}
inline void start_block(unsigned, unsigned) {}
inline void join(const unsigned*, unsigned, const void*) {}
inline void release(const void*) {}
inline void acquire(const void*) {}
inline void forget(const void*) {}
inline void touch(const void*, size_t, bool, Site) {}
inline unsigned unit_of_warp(unsigned) { return 0; }
inline unsigned unit_of_mbarrier(unsigned) { return 0; }
inline void touch_as(unsigned, uint32_t, const void*, size_t, bool, Site) {}
inline void learn(unsigned, unsigned, uint32_t) {}
inline void fence_proxy() {}
inline void begin_async(const void*, size_t, Site) {}
inline void end_async(const void*, size_t, Site) {}
inline void atomic(const void*, size_t, Site) {}
inline void release_flag(const void*) {}
inline void acquire_flag(const void*) {}
#endif

} // namespace emulator::race
