"""Decode with sliding windows and sinks, on one GPU: the attention kernel alone, then steps of gpt-oss-20b's shape.

    python tests/benchmarks/sliding_windows.py [--layers 8] [--context 1024 8192] [--minutes 8] [--tiny]

Kernel: one token of gpt-oss-20b (64 heads, 8 key heads of 64, sinks, a window of 128) over caches of several lengths,
beside the same attention written out, and over the whole cache. Model: random bfloat16 weights made on the GPU, the
cache filled by an eager prefill; milliseconds a step, the median. ``--tiny`` tries the script itself on a CPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from gpu_kernels_table import graph_time
from whole_model import TRITON, Shape, by_ktfx, copy_bandwidth, eager, gpt_oss, report

CONTENDERS: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "eager, grouped_mm": eager("grouped_mm"),
    "ktfx": by_ktfx(TRITON),
    "ktfx no fuse_attention": by_ktfx({**TRITON, "passes": ["rewrite_experts"]}),
    "ktfx no CUDA graphs": by_ktfx(TRITON, cuda_graphs=False),
    "ktfx windows alone": by_ktfx(TRITON, sliding_cache="window"),
}
WINDOW = 128


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--context", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS))
    parser.add_argument("--minutes", type=float, default=8.0, help="start nothing after so long")
    parser.add_argument("--profile", action="store_true", help="print the kernels of one ktfx step")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    began = time.perf_counter()
    if not args.tiny:
        bandwidth = copy_bandwidth()
        print(
            f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s", flush=True
        )
        for length in (2048, 8192, 32768, 131072):
            attention(length, bandwidth)
    model = gpt_oss(args.layers, args.tiny)
    for context in args.context:
        shape = Shape(args.layers, 1, context, args.tiny)
        print(f"gpt-oss-20b's shape, {args.layers} layers, batch 1, context {context}", flush=True)
        reference = None
        for name in args.contenders:
            if time.perf_counter() - began > 60 * args.minutes:
                print(f"  {name:24} not started: time is up")
                continue
            reference = report(name, CONTENDERS[name], model, shape, None, reference, args.profile)


def attention(length: int, bandwidth: float) -> None:
    """Microseconds of one layer's attention at the end of a cache, and the share of bandwidth where all is read."""
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    from ktfx.ops import load_ops

    load_ops()
    device, dtype = "cuda", torch.bfloat16
    q = torch.randn(1, 64, 1, 64, device=device, dtype=dtype)
    k, v = (torch.randn(1, 8, length, 64, device=device, dtype=dtype) for _ in range(2))
    sinks = torch.randn(64, device=device, dtype=dtype)
    module: Any = SimpleNamespace(sinks=sinks, num_key_value_groups=8, training=False)
    position = torch.arange(length, device=device)
    last = (position >= length - 9 - WINDOW) & (position < length - 9)
    for name, keep in (("window", last), ("full", position >= 0)):
        mask = torch.where(keep, 0.0, torch.finfo(dtype).min).to(dtype).view(1, 1, 1, -1)
        bounds = torch.ops.ktfx.mask_bounds(mask)
        seen = torch.tensor([length - 9 if name == "window" else length], device=device)
        window = WINDOW if name == "window" else 0
        calls: dict[str, Callable[[], Any]] = {
            "written out": lambda m=mask: eager_attention_forward(module, q, k, v, m, 0.125),
            "by mask": lambda m=mask, b=bounds: torch.ops.ktfx.attention_decode_masked(
                q, k, v, m, 0.125, sinks, 0.0, b
            ),
            "by length": lambda n=seen, w=window: torch.ops.ktfx.attention_decode(q, k, v, n, 0.125, w, sinks),
            "its bounds (ATen)": lambda m=mask: torch.ops.ktfx.mask_bounds(m),
        }
        took = {call: graph_time([run] * 20) for call, run in calls.items()}
        share = 2.0 * k.numel() * k.element_size() / (took["by mask"] * 1e-6) / bandwidth if name == "full" else None
        text = ", ".join(f"{call} {us:.1f} µs" for call, us in took.items())
        print(f"attention over {length} {name:6} {text}" + (f"; {share:.0%} of bandwidth" if share else ""), flush=True)


if __name__ == "__main__":
    main()
