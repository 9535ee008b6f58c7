#!/usr/bin/env bash
# Whole models and decode kernels on one GPU in under ten minutes, without an install. Usage: gpu_short.sh OUT_DIR PART …
# Parts: rows, step, full, batch, prefill, tests, sanitize, sliding, tune, cpu.
set -u
out=$1
shift
repo=$PWD
bench="$repo/tests/benchmarks"
# The package without an install: its parts side by side.
mkdir -p /tmp/package/ktfx
ln -sf "$repo"/ktfx/* "$repo/passes" "$repo/rules" "$repo/triton_kernels" /tmp/package/ktfx/
export PYTHONPATH=/tmp/package PYTHONUNBUFFERED=1
(python3 setup.py build_ext --inplace > "$out/build.log" 2>&1; echo "built" >> "$out/build.log") &
cd /tmp || exit 1
show() { grep -v "^ *File\|^Traceback" "$1" | cut -c1-150; }
for part in "$@"; do
  echo "== $part ($SECONDS s)"
  case $part in
    rows)
      timeout 100 python3 "$bench/linear_rows.py" > "$out/rows.log" 2>&1
      show "$out/rows.log"
      ;;
    step)
      timeout 150 python3 "$bench/whole_model.py" --layers 8 --minutes 2 --reference --profile \
        --contenders "eager, grouped_mm" "ktfx" > "$out/step.log" 2>&1
      show "$out/step.log"
      ;;
    full)
      timeout 140 python3 "$bench/whole_model.py" --layers 48 --minutes 1.6 --contenders "ktfx" \
        "ktfx int4 experts" > "$out/full.log" 2>&1
      show "$out/full.log"
      ;;
    batch)
      timeout 200 python3 "$bench/whole_model.py" --layers 8 --batch 16 64 --minutes 2.6 --contenders "ktfx" \
        "torch.compile reduce-overhead" "eager, grouped_mm" > "$out/batch.log" 2>&1
      show "$out/batch.log"
      ;;
    prefill)
      timeout 120 python3 "$bench/whole_model.py" --layers 8 --contenders --prefill 4096 > "$out/prefill.log" 2>&1
      show "$out/prefill.log"
      ;;
    tests)
      timeout 150 python3 -m pytest "$repo"/tests/test_cuda_graphs.py "$repo"/tests/test_triton_*.py -m "not slow" \
        -n 14 -q --no-header -p no:cacheprovider --tb=short --rootdir "$repo" -c "$repo/pyproject.toml" \
        > "$out/tests.log" 2>&1
      grep -E "^(FAILED|ERROR)|passed|failed" "$out/tests.log" | cut -c1-200
      ;;
    sanitize)
      KTFX_FEW_EXAMPLES=1 timeout 240 compute-sanitizer --tool memcheck --target-processes all --print-limit 5 \
        python3 -m pytest "$repo"/tests/test_triton_*.py -m "not slow" -n 14 -q --no-header -p no:cacheprovider \
        --tb=line --rootdir "$repo" -c "$repo/pyproject.toml" > "$out/sanitize.log" 2>&1
      grep -E "ERROR SUMMARY|Invalid|passed|failed" "$out/sanitize.log" | sort | uniq -c | tail -20 | cut -c1-200
      ;;
    sliding)
      timeout 150 python3 "$bench/sliding_windows.py" > "$out/sliding.log" 2>&1
      show "$out/sliding.log"
      ;;
    tune)
      timeout 200 python3 "$bench/gpu_kernels_table.py" --out "$out" --tune --minutes 2 > "$out/tune.log" 2>&1
      tail -12 "$out/tune.log" | cut -c1-160
      cp "$out/tuned_hopper.json" "$repo/triton_kernels/" # what follows runs with it
      ;;
    cpu)
      wait
      OMP_NUM_THREADS=$(nproc) timeout 80 python3 "$bench/cpu_experts_table.py" --quick --layers 4 --seconds 1 \
        --no-sweeps --no-transformers --tokens 1,4,16 --formats model,int8,int4 --json "$out/cpu.json" \
        > "$out/cpu.log" 2>&1
      tail -c 3500 "$out/cpu.log"
      ;;
  esac
done
