#!/usr/bin/env bash
# The new things on one GPU in under six minutes: tests, whole models at 8 and 48 layers, the host's CPU experts.
# Usage: gpu_short.sh OUT_DIR
set -u
out=$1
repo=$PWD
# The package without an install: its parts side by side.
mkdir -p /tmp/package/ktfx
ln -sf "$repo"/ktfx/* "$repo/passes" "$repo/rules" "$repo/triton_kernels" /tmp/package/ktfx/
export PYTHONPATH=/tmp/package PYTHONUNBUFFERED=1
(python3 setup.py build_ext --inplace > "$out/build.log" 2>&1; echo "built" >> "$out/build.log") &
cd /tmp || exit 1
(timeout 100 python3 -m pytest "$repo"/tests/test_cuda_graphs.py "$repo"/tests/test_rewrite_linears.py \
  "$repo"/tests/test_triton_attention.py -k "gpu or real" -n 5 -q --no-header -p no:cacheprovider --tb=short \
  --rootdir "$repo" -c "$repo/pyproject.toml" > "$out/tests.log" 2>&1) &
bench="$repo/tests/benchmarks"
timeout 130 python3 "$bench/whole_model.py" --layers 8 --minutes 1.8 --reference --contenders "eager, grouped_mm" \
  "ktfx int4 experts" "torch.compile reduce-overhead" "ktfx merged" "ktfx fused" > "$out/whole8.log" 2>&1
grep -E "^(FAILED|ERROR)|passed|failed" "$out/tests.log" | cut -c1-200
cat "$out/whole8.log" | grep -v "^ *File\|^Traceback" | cut -c1-150
timeout 95 python3 "$bench/whole_model.py" --layers 48 --minutes 0.9 --contenders "ktfx fused" "eager, grouped_mm" \
  "ktfx merged" > "$out/whole48.log" 2>&1
cut -c1-150 "$out/whole48.log" | tail -12
tail -1 "$out/build.log"
OMP_NUM_THREADS=$(nproc) timeout 80 python3 "$bench/cpu_experts_table.py" --quick --layers 4 --seconds 1 --no-sweeps --no-transformers \
  --tokens 1,4,16 --formats model,int8,int4 --json "$out/cpu.json" > "$out/cpu.log" 2>&1
tail -c 3500 "$out/cpu.log"
