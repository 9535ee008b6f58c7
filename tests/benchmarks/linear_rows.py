"""The decode step's linear kernel on one GPU: configurations beside F.linear, and with it begun ahead of time or not.

    python tests/benchmarks/linear_rows.py

Each line: one product of one row in bfloat16, replays of one CUDA graph over enough weights that L2 does not help, each
product reading what the one before wrote where the shapes allow it. Shapes: Qwen3-30B-A3B's q/k/v, output, router and
head, DeepSeek-V2-Lite's and gpt-oss-20b's q/k/v.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from gpu_kernels_table import graph_time, limits, randn
from ktfx.triton_kernels.linear_rows import RowsConfig, linear_rows, rows_config

SHAPES = {
    "Qwen3 q/k/v": ((4096, 512, 512), 2048),
    "Qwen3 output": ((2048,), 4096),
    "Qwen3 router": ((128,), 2048),
    "Qwen3 head": ((151936,), 2048),
    "gpt-oss q/k/v": ((4096, 512, 512), 2880),
    "DeepSeek-V2-Lite q, kv_a": ((3072, 576), 2048),
}
CONFIGS = [RowsConfig(R, BK, warps) for R in (1, 2, 4, 8) for BK in (512, 1024, 2048) for warps in (2, 4, 8)]


def main() -> None:
    limit = limits()
    print(f"{torch.cuda.get_device_name()}: read {limit['read'] / 1e12:.2f} TB/s, copy {limit['copy'] / 1e12:.2f} TB/s")
    for name, (sizes, K) in SHAPES.items():
        nbytes = 2 * sum(sizes) * K
        copies = max(2, min(64, int(400e6 / nbytes)))
        weights = [[randn(n, K, scale=0.02, seed=i) for n in sizes] for i in range(copies)]
        x = randn(1, K)

        def line(what: str, us: float, nbytes: int = nbytes, name: str = name) -> None:
            print(f"  {name:26} {what:34} {us:8.2f} µs  {nbytes / us / limit['read'] * 1e6:5.0%} of read", flush=True)

        joined = [torch.cat(w) for w in weights]
        line("F.linear, merged", graph_time([partial(torch.nn.functional.linear, x, w) for w in joined]))
        best = []
        for config in CONFIGS:
            calls = [partial(linear_rows, x, w, [], config=config) for w in weights]
            best.append((graph_time(calls, 0.02), config))
        best.sort(key=lambda item: item[0])
        for us, config in best[:3]:
            line(f"R{config.R} BK{config.BK} warps {config.num_warps}", us)
        own = rows_config(sum(sizes), K, x.device)
        line(f"chosen: R{own.R} BK{own.BK} warps {own.num_warps}", next(us for us, c in best if c == own))


if __name__ == "__main__":
    main()
