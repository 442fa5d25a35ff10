#!/usr/bin/env bash
# Builds libcuda.so.1, the emulated driver with all kernels in it, into OUT_DIR.
#
#   kernels/emulator/build.sh OUT_DIR [--race] [--asan] [--kernels DIR]
#
#   --race          with the race detector
#   --asan          with the address sanitizer (the program that loads the library must preload libasan.so)
#   --kernels DIR   with the kernel files DIR/*.cu, which take the place of those of the same name in kernels/
#
# Objects stay in OUT_DIR and are made again when their source or any header is newer. Needs g++ (or $CXX) and nothing of CUDA.
set -euo pipefail

usage() { sed -n 's/^#   kernels/usage: kernels/p' "$0" >&2; exit 2; }
emulator=$(cd "$(dirname "$0")" && pwd)
kernels=$(dirname "$emulator")
[ $# -ge 1 ] && [ "${1#-}" = "$1" ] || usage
out=$1; shift
mode=() instrument=() more=
while [ $# -gt 0 ]; do
    case $1 in
        # Only kernels are instrumented; libtsan is not linked, race.cpp has the hooks.
        --race) mode=(-DEMULATOR_RACE) instrument=(-fsanitize=thread -g) ;;
        --asan) mode=(-fsanitize=address -fno-omit-frame-pointer -g) ;;
        --kernels) shift; more=$1 ;;
        *) usage ;;
    esac
    shift
done

mkdir -p "$out"
# The management library is in the same file, so that it counts the same memory.
ln -sf libcuda.so.1 "$out/libnvidia-ml.so.1"
export CXX=${CXX:-g++}
flags=(-std=c++17 -O2 -fPIC -ftls-model=initial-exec -fvisibility-inlines-hidden -Wall -Wextra "${mode[@]}")
kernel_flags=(-g1 -fno-strict-aliasing -Wno-unknown-pragmas -Wno-psabi -Wno-tsan "${instrument[@]}"
    -I"$emulator/include" -I"$kernels/lib" -include "$emulator/include/prelude.h")
newest=$(ls -t "$kernels"/lib/*.cuh "$emulator"/include/* "$emulator"/src/*.h "$0" | head -1)

objects=() jobs=()
# The command that makes $1 from $2, if it has to be made. Commands are separated by NUL for xargs.
make_object() {
    local object=$1 source=$2; shift 2
    objects+=("$object")
    if [ "$object" -nt "$source" ] && [ "$object" -nt "$newest" ]; then return; fi
    jobs+=("$(printf '%q ' "$@")")
}
for source in "$emulator"/src/*.cpp; do
    name=$(basename "$source" .cpp)
    [[ $name = race* ]] && [[ " ${mode[*]} " != *" -DEMULATOR_RACE "* ]] && continue
    make_object "$out/$name.o" "$source" "$CXX" "${flags[@]}" -c -o "$out/$name.o" "$source"
done
for name in $(ls "$kernels" ${more:+"$more"} | sed -n 's/\.cu$//p' | sort -u); do
    source=$kernels/$name.cu
    [ -n "$more" ] && [ -e "$more/$name.cu" ] && source=$more/$name.cu
    # Each kernel file has a namespace of its own (include/prelude.h says why).
    wrapper=$out/$name.wrapper.cpp
    printf 'namespace in_%s {\n#include "%s"\n}\n' "$name" "$(realpath "$source")" > "$wrapper.new"
    cmp -s "$wrapper.new" "$wrapper" && rm "$wrapper.new" || mv "$wrapper.new" "$wrapper"
    [ "$wrapper" -nt "$source" ] && made_from=$wrapper || made_from=$source
    make_object "$out/$name.cu.o" "$made_from" "$CXX" "${flags[@]}" "${kernel_flags[@]}" -c -o "$out/$name.cu.o" "$wrapper"
done
if [ ${#jobs[@]} -gt 0 ]; then
    printf '%s\0' "${jobs[@]}" | xargs -0 -P 2 -n 1 bash -c
elif [ -e "$out/libcuda.so.1" ] && [ -z "$(find "$out" -name '*.o' -newer "$out/libcuda.so.1")" ]; then
    exit 0
fi
"$CXX" -shared "${mode[@]}" -Wl,-soname,libcuda.so.1 -Wl,-z,defs -o "$out/libcuda.so.1.new" "${objects[@]}" -lpthread -ldl
mv "$out/libcuda.so.1.new" "$out/libcuda.so.1" # at once: a running test keeps the old one
