#!/usr/bin/env bash
# The CPU kernels and their drivers for aarch64: cross-compiled with the package's own flags, all units, and run under qemu's user
# mode where there is one. Debian: apt-get install g++-aarch64-linux-gnu qemu-user.   tests/native/aarch64.sh
# Builds under build/aarch64. The tile kernels take the compiler some minutes.
set -euo pipefail
cd "$(dirname "$0")/../.."
cxx=${CXX:-aarch64-linux-gnu-g++}
flags="-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wall -Wextra -Wno-psabi -Wno-unused-function -Wno-maybe-uninitialized"
out=build/aarch64
mkdir -p "$out"
for unit in experts linear pack async pool features measure isa_portable isa_amx_emulated; do
    echo "$flags -c ktfx/cpu_kernels/$unit.cpp -o $out/$unit.o"
done | xargs -P "$(nproc)" -L 1 "$cxx"
for unit in driver linear_driver; do
    # shellcheck disable=SC2086
    "$cxx" $flags "tests/native/$unit.cpp" "$out"/*.o -static -pthread -o "$out/$unit"
done
echo "all units compiled and linked"
if command -v qemu-aarch64 >/dev/null; then
    KTFX_CPU_ISA=portable qemu-aarch64 "$out/driver"
    KTFX_CPU_ISA=portable qemu-aarch64 "$out/linear_driver"
fi
