#!/usr/bin/env bash
# Builds what the emulator's tests need into OUT_DIR/plain and OUT_DIR/race: the library without and with the race detector,
# with the tests' own kernels in it, and beside it the programs `probes` and `kernels`.
#
#   kernels/emulator/tests/build.sh OUT_DIR
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:?usage: kernels/emulator/tests/build.sh OUT_DIR}
mkdir -p "$out"
for program in probes kernels; do
    object=$out/$program.o newest=$(ls -t "$here"/*.h "$here/$program.cpp" | head -1)
    [ "$object" -nt "$newest" ] || ${CXX:-g++} -std=c++17 -O1 -Wall -Wextra -c -o "$object" "$here/$program.cpp"
done
for build in plain race; do
    lib=$out/$build
    "$here/../build.sh" "$lib" --kernels "$here" $([ $build = race ] && echo --race)
    for program in probes kernels; do
        ${CXX:-g++} -o "$lib/$program" "$out/$program.o" "$lib/libcuda.so.1" -Wl,-rpath,"$lib" -lpthread
    done
done
