"""The decode step's linear kernel on one GPU: configurations beside F.linear, and with it begun ahead of time or not.

    python tests/benchmarks/linear_rows.py [--shared]

Each line: one product of one row in bfloat16, replays of one CUDA graph over enough weights that L2 does not help, each
product reading what the one before wrote where the shapes allow it. Shapes: Qwen3-30B-A3B's q/k/v, output, router and
head, DeepSeek-V2-Lite's and gpt-oss-20b's q/k/v.

Then (``--shared``: nothing else) shared experts, from their input to the sum with the routed experts' output: with
Inductor's kernels for act(gate)·up and for the sum between the products, with the first of them done where gate and up
are made, and with both done in the products, each with its relative error against float64; and configurations of these
two products.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.nn.functional as F
from gpu_kernels_table import graph_time, limits, randn, relative
from ktfx.triton_kernels.linear_rows import RowsConfig, linear_rows, linear_rows_add, rows_config

SHAPES = {
    "Qwen3 q/k/v": ((4096, 512, 512), 2048),
    "Qwen3 output": ((2048,), 4096),
    "Qwen3 router": ((128,), 2048),
    "Qwen3 head": ((151936,), 2048),
    "gpt-oss q/k/v": ((4096, 512, 512), 2880),
    "DeepSeek-V2-Lite q, kv_a": ((3072, 576), 2048),
}
CONFIGS = [RowsConfig(R, BK, warps) for R in (1, 2, 4, 8) for BK in (512, 1024, 2048) for warps in (2, 4, 8)]
# (hidden, intermediate of all shared experts, whether a sigmoid of the input weighs them)
SHARED = {
    "DeepSeek-V2-Lite": (2048, 2816, False),
    "Qwen1.5-MoE-A2.7B": (2048, 5632, True),
    "GLM-4.5-Air": (4096, 1408, False),
    "DeepSeek-V3": (7168, 2048, False),
}


@dataclass(frozen=True)
class SharedExperts:
    """One layer's weights, and one row of its input, of the routed experts' output and of the shared ones' share."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    x: torch.Tensor
    routed: torch.Tensor
    share: torch.Tensor | None

    def exact(self) -> torch.Tensor:
        x = self.x.double()
        h = F.silu(F.linear(x, self.gate.double())) * F.linear(x, self.up.double())
        y = F.linear(h, self.down.double())
        return self.routed.double() + (y if self.share is None else y * self.share.double().sigmoid())

    def apart(self, activate: Callable[..., Any], add: Callable[..., Any]) -> Any:
        h = activate(*linear_rows(self.x, [self.gate, self.up], []))
        return add(self.routed, linear_rows(h, [self.down], [])[0], self.share)

    def gated(self, add: Callable[..., Any]) -> Any:
        (h,) = linear_rows(self.x, [self.gate, self.up], [], act="silu")
        return add(self.routed, linear_rows(h, [self.down], [])[0], self.share)

    def together(self) -> torch.Tensor:
        (h,) = linear_rows(self.x, [self.gate, self.up], [], act="silu")
        return linear_rows_add(h, self.down, None, self.routed, self.share)


def layers_of(name: str) -> tuple[list[SharedExperts], int]:
    """So many layers that L2 does not help, and a layer's bytes."""
    H, inter, gated = SHARED[name]
    nbytes = 2 * 3 * H * inter

    def layer(seed: int) -> SharedExperts:
        gate, up = (randn(inter, H, scale=H**-0.5, seed=10 * seed + i) for i in (0, 1))
        x, routed = (randn(1, H, seed=10 * seed + i) for i in (2, 3))
        share = randn(1, 1, seed=10 * seed + 4) if gated else None
        return SharedExperts(gate, up, randn(H, inter, scale=inter**-0.5, seed=10 * seed + 5), x, routed, share)

    return [layer(i) for i in range(max(2, min(64, int(400e6 / nbytes))))], nbytes


def time_shared(name: str, read: float) -> None:
    layers, nbytes = layers_of(name)
    torch._dynamo.reset()
    activate = torch.compile(lambda gate, up: F.silu(gate) * up, dynamic=False)
    add = torch.compile(lambda r, y, share: r + (y if share is None else torch.sigmoid(share) * y), dynamic=False)
    ways = {
        "apart": [partial(layer.apart, activate, add) for layer in layers],
        "act(gate)·up where they are made": [partial(layer.gated, add) for layer in layers],
        "and the sum in the product": [layer.together for layer in layers],
    }
    for what, calls in ways.items():
        error = relative(calls[0](), layers[0].exact())
        us = graph_time(calls)
        print(f"  {name:26} {what:34} {us:8.2f} µs  {nbytes / us / read * 1e6:5.0%} of read, error {error:.1e}")


def sweep_shared(name: str, read: float) -> None:
    layers, nbytes = layers_of(name)
    inter, H = layers[0].gate.shape
    h = randn(1, inter)

    def up(s: SharedExperts, c: RowsConfig) -> Any:
        return linear_rows(s.x, [s.gate, s.up], [], act="silu", config=c)

    def down(s: SharedExperts, c: RowsConfig) -> Any:
        return linear_rows_add(h, s.down, None, s.routed, s.share, config=c)

    for what, call, part, rows, own in (
        ("gate, up", up, 2 / 3, (2, 4, 8), rows_config(2 * inter, H, h.device)),
        ("down, sum", down, 1 / 3, (1, 2, 4), rows_config(H, inter, h.device)),
    ):
        configs = dict.fromkeys([own, *(RowsConfig(R, BK, w) for R in rows for BK in (1024, 2048) for w in (4, 8))])
        timed = {c: graph_time([partial(call, s, c) for s in layers], 0.02) for c in configs}
        for c in dict.fromkeys([*sorted(configs, key=timed.__getitem__)[:3], own]):
            label = f"{what}: R{c.R} BK{c.BK} warps {c.num_warps}{' (chosen)' if c == own else ''}"
            print(f"  {name:26} {label:34} {timed[c]:8.2f} µs  {nbytes * part / timed[c] / read * 1e6:5.0%} of read")


def time_products(limit: dict[str, float]) -> None:
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


def main() -> None:
    limit = limits()
    print(f"{torch.cuda.get_device_name()}: read {limit['read'] / 1e12:.2f} TB/s, copy {limit['copy'] / 1e12:.2f} TB/s")
    if "--shared" not in sys.argv[1:]:
        time_products(limit)
    for name in SHARED:
        time_shared(name, limit["read"])
    sweep_shared("DeepSeek-V2-Lite", limit["read"])


if __name__ == "__main__":
    main()
