#!/usr/bin/env bash
# The CPU kernels, driver.cpp and linear_driver.cpp under AddressSanitizer with UBSan, then under ThreadSanitizer: tests/native/sanitize.sh
# Builds under build/sanitize; stops at the first report.
set -euo pipefail
cd "$(dirname "$0")/../.."
cxx=${CXX:-g++}
flags="-std=c++17 -O1 -g -fno-omit-frame-pointer -ffp-contract=fast -fno-math-errno -Wno-psabi -Wno-maybe-uninitialized"
units="experts linear pack async pool features measure isa_portable isa_amx_emulated"
if [ "$(uname -m)" = x86_64 ]; then units="$units isa_avx2 isa_avx512 isa_amx"; fi
avx512="-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni"

build() { # name, sanitizer flags
    local out=build/sanitize/$1
    shift
    mkdir -p "$out"
    local unit extra
    for unit in $units; do
        case $unit in
        isa_avx2) extra="-mavx2 -mfma -mf16c" ;;
        isa_avx512) extra=$avx512 ;;
        isa_amx) extra="$avx512 -mavx512bf16 -mamx-tile -mamx-bf16 -mamx-int8" ;;
        *) extra="" ;;
        esac
        echo "$flags $* $extra -c ktfx/cpu_kernels/$unit.cpp -o $out/$unit.o"
    done | xargs -P "$(nproc)" -L 1 "$cxx"
    for unit in driver linear_driver; do
        # shellcheck disable=SC2086
        "$cxx" $flags "$@" "tests/native/$unit.cpp" "$out"/*.o -pthread -o "$out/$unit"
    done
}

build address -fsanitize=address,undefined -fno-sanitize-recover=all -fno-sanitize=alignment
build/sanitize/address/driver
build/sanitize/address/linear_driver
build thread -fsanitize=thread
TSAN_OPTIONS=halt_on_error=1 build/sanitize/thread/driver --no-fork
TSAN_OPTIONS=halt_on_error=1 build/sanitize/thread/linear_driver
