// The emulator's KERNEL and SHARED macros (their device side is in kernels/lib/kernel.cuh).
#pragma once
#include "emulator.h"
#include <type_traits>
#include <utility>

namespace emulator {

/// Unpacks the driver's `void**` for one kernel function and registers it under its name.
template <auto function>
struct Launcher;
template <class... Parameters, void (*function)(Parameters...)>
struct Launcher<function> {
    static constexpr unsigned count = sizeof...(Parameters);
    static constexpr unsigned sizes[count + 1] = {unsigned(sizeof(Parameters))..., 0};
    static constexpr unsigned alignments[count + 1] = {unsigned(alignof(Parameters))..., 0};
    template <size_t... i>
    static void unpack(void** arguments, std::index_sequence<i...>) {
        function(*static_cast<std::remove_reference_t<Parameters>*>(arguments[i])...);
    }
    static void call(void** arguments) { unpack(arguments, std::index_sequence_for<Parameters...>{}); }
    Launcher(const char* name, const char* file) { register_kernel({name, file, call, count, sizes, alignments}); }
};

struct GlobalRegistration {
    GlobalRegistration(const char* name, void* address, size_t bytes) { register_global(name, address, bytes); }
};

/// The start of dynamic shared memory as a `Struct`; the launch must have asked for as many bytes.
template <class Struct>
Struct& shared_struct(Site site) {
    static_assert(std::is_trivially_default_constructible_v<Struct>, "shared memory is never constructed");
    shared_offset(place.shared, sizeof(Struct), site);
    return *reinterpret_cast<Struct*>(place.shared);
}

} // namespace emulator

#define KERNEL(name) static const ::emulator::Launcher<name> emulator_launcher_##name(#name, __FILE__);
#define KERNEL_SHARED(name, Struct)                                                                                    \
    SHARED_FITS(Struct)                                                                                                \
    static unsigned name##_shared_bytes = sizeof(Struct);                                                              \
    static const ::emulator::GlobalRegistration emulator_global_##name(                                                \
        #name "_shared_bytes", &name##_shared_bytes, sizeof(unsigned));
#define SHARED(Struct, name) Struct& name = ::emulator::shared_struct<Struct>({__FILE__, __LINE__})
