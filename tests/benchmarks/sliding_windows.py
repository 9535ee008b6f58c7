"""Decode with sliding windows and sinks, on one GPU: the attention kernel alone, then steps of gpt-oss-20b's shape.

    python tests/benchmarks/sliding_windows.py [--layers 8] [--context 1024 8192] [--minutes 8] [--tiny]

Kernel: one token of gpt-oss-20b (64 heads, 8 key heads of 64, sinks, a window of 128) over caches of several lengths,
beside the same attention written out, and over the whole cache. Model: random bfloat16 weights made on the GPU, the
cache filled by an eager prefill; milliseconds a step, the median. ``--tiny`` tries the script itself on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import traceback
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from whole_model import Shape, by_ktfx, copy_bandwidth, decode, eager, filled_cache, kernels

import ktfx

TRITON: dict[str, Any] = {
    "ktfx": 1,
    "default_device": "cuda:0",
    "rules": [{"match": {"module": "experts"}, "replace": {"op": "experts.triton"}}],
}
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
    model = make_model(args.layers, args.tiny)
    for context in args.context:
        shape = Shape(args.layers, 1, context, args.tiny)
        print(f"gpt-oss-20b's shape, {args.layers} layers, batch 1, context {context}", flush=True)
        reference = None
        for name in args.contenders:
            if time.perf_counter() - began > 60 * args.minutes:
                print(f"  {name:24} not started: time is up")
                continue
            reference = report(name, model, shape, reference, args.profile)


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
        took = {call: captured_microseconds(run) for call, run in calls.items()}
        share = 2.0 * k.numel() * k.element_size() / (took["by mask"] * 1e-6) / bandwidth if name == "full" else None
        text = ", ".join(f"{call} {us:.1f} µs" for call, us in took.items())
        print(f"attention over {length} {name:6} {text}" + (f"; {share:.0%} of bandwidth" if share else ""), flush=True)


def captured_microseconds(run: Callable[[], Any], times: int = 20) -> float:
    """Of one call among ``times`` in a CUDA graph: launches cost what they cost in a recorded step."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            run()
    measured = []
    for _ in range(10):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        measured.append(start.elapsed_time(end) * 1e3 / times)
    return statistics.median(measured[2:])


def make_model(layers: int, tiny: bool) -> Any:
    """gpt-oss-20b's shape (its published config), or a small one; sinks and biases are not zero."""
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 2880, "intermediate_size": 2880, "num_local_experts": 32, "num_experts_per_tok": 4,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 201088,
    }  # fmt: skip
    if tiny:
        sizes |= {"hidden_size": 64, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2,
                  "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 1000}  # fmt: skip
    config = GptOssConfig(**sizes, num_hidden_layers=layers, sliding_window=WINDOW)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = GptOssForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    device = torch.device("cpu" if tiny else "cuda")
    model.to_empty(device=device)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)  # its table was on meta
    for name, parameter in model.named_parameters():
        parameter.fill_(1.0) if "norm" in name else parameter.normal_(0.0, 0.02)
    return model


def report(name: str, model: Any, shape: Shape, reference: Any, profile: bool) -> Any:
    """One line of the table; a contender that fails says why and the rest goes on."""
    began = time.perf_counter()
    try:
        ids = torch.arange(shape.context * shape.batch, device=shape.device).view(shape.batch, -1) % 997
        cache = filled_cache(model, ids, shape)
        step = CONTENDERS[name](model)
        logits, ms = decode(step, cache, shape)
        note = ""
        if reference is None:
            reference = logits
        else:
            note = f"  off the first by {float((logits - reference).norm() / reference.norm()):.1e}"
        print(f"  {name:24} {ms:8.3f} ms  ({time.perf_counter() - began:.0f} s){note}", flush=True)
        if profile and name.startswith("ktfx") and not shape.tiny:
            kernels(step, cache, shape)
    except Exception as error:  # the table goes on
        print(f"  {name:24} failed: {type(error).__name__}: {str(error)[:300]}", flush=True)
        traceback.print_exc(limit=4)
    finally:
        ktfx.restore(model)
        cache = step = None
        torch._dynamo.reset()
        gc.collect()
        if not shape.tiny:
            torch.cuda.empty_cache()
    return reference


if __name__ == "__main__":
    main()
