#!/usr/bin/env bash
# One pass over a GPU machine: install, then the parts named. Usage: gpu_session.sh OUT_DIR [tests] [kernels] [cpu] [compile]
set -u
out=$1
shift
python3 -m pip install -q --no-build-isolation --no-deps -e . 2>&1 | tail -2
python3 -c "import torch, transformers, triton; print(torch.__version__, transformers.__version__, triton.__version__, torch.cuda.device_count(), 'GPUs')"
for part in "$@"; do
  case $part in
    tests)
      timeout 200 python3 -m pytest tests/test_backend.py tests/test_parity.py tests/test_program.py \
        tests/test_triton_devices.py -n 24 -q --no-header -p no:cacheprovider --tb=short -p no:warnings \
        > "$out/tests.log" 2>&1
      grep -E "^(FAILED|ERROR)|passed|failed" "$out/tests.log" | cut -c1-200
      ;;
    kernels)
      PYTHONUNBUFFERED=1 timeout 200 python3 tests/benchmarks/gpu_kernels_table.py --out "$out" --minutes 3 \
        > "$out/kernels.log" 2>&1
      tail -c 6000 "$out/kernels.log"
      ;;
    cpu)
      # Four layers, or a large last-level cache holds the weights. OMP threads: PyTorch's own matmul is the yardstick.
      OMP_NUM_THREADS=$(nproc) timeout 280 python3 tests/benchmarks/cpu_experts_table.py --quick --layers 4 --seconds 3 \
        --tokens 1,4,16,1024 --formats model,int8,int4,int4+int8 --json "$out/cpu.json" > "$out/cpu.log" 2>&1
      grep -E "WRONG|^checked|matmul|tokens \||^\| (ktfx|transformers)|reading" "$out/cpu.log" | cut -c1-110
      sed -n '/^packing/,$p' "$out/cpu.log" | tail -c 5000
      ;;
    compile)
      timeout 240 python3 tests/benchmarks/compile_times.py --layers 4 12 48 --real > "$out/compile.log" 2>&1
      tail -c 2000 "$out/compile.log"
      ;;
  esac
done
