"""Every Triton kernel on one GPU: right (against float64, outputs poisoned) and how fast, beside what the GPU can do.

    python tests/benchmarks/gpu_kernels_table.py --out DIR [--only NAME …] [--tune] [--minutes M]

Worker processes first check every case at few experts, which also fills Triton's disk cache, so that kernels compile
in parallel; then this process alone times the cases, as replays of one CUDA graph that walks through enough different
weights that L2 does not help. ``--only stock`` are PyTorch's own experts, eager and compiled. A case that fails is
printed and the rest goes on. The table goes to standard output, all numbers to DIR/kernels.json. With --tune it sweeps
configurations of the experts instead and writes the fastest to DIR/tuned_hopper.json, which is to be copied to
triton_kernels/.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import ktfx.ops.activations
import ktfx.ops.attention
import ktfx.ops.mla
import ktfx.ops.norms
import ktfx.ops.rope
import ktfx.ops.router  # noqa: F401
from ktfx.formats import dequantize, from_tensors, storage
from ktfx.ops.attention import attention_decode_reference
from ktfx.ops.experts import ExpertsSpec, apply_gate
from ktfx.ops.experts_triton import TRITON_KERNEL, packed_meta
from ktfx.ops.linear import LinearSpec, linear_kernel
from ktfx.ops.mla import mla_decode_reference
from ktfx.ops.norms import rms_norm_reference
from ktfx.ops.rope import rope_reference
from ktfx.ops.router import route_reference
from ktfx.tuning import SHIPPED, remember

DEVICE = torch.device("cuda")
BF16 = torch.bfloat16
TOLERANCE = 1.5e-2
TUNED_TABLE: Path | None = None  # where a sweep writes; set by main


@dataclass
class Row:
    """One line: time in µs, bytes that have to be moved, floating-point operations, relative error, what went wrong."""

    case: str
    us: float = math.nan
    nbytes: float = 0
    flops: float = 0
    error: float = math.nan
    problem: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


# -- timing
def graph_time(calls: list[Callable[[], Any]], seconds: float = 0.06) -> float:
    """Microseconds a call: the calls captured one after another, the median over replays timed by events."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times: list[float] = []
    stop = time.time() + seconds
    while len(times) < 5 or (time.time() < stop and len(times) < 200):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(calls))
    return statistics.median(times)


def limits() -> dict[str, float]:
    """Device copy and read in bytes a second, bf16 matmul in operations a second, an empty step of a graph in µs."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    copy = graph_time([lambda: target.copy_(source)])
    a = torch.randn(8192, 8192, device=DEVICE, dtype=BF16)
    matmul = graph_time([lambda: a @ a])
    words = source.view(torch.float32)
    read = graph_time([lambda: words.sum()])
    small = torch.zeros(8, device=DEVICE)
    step = graph_time([lambda: small.add_(1)] * 100)
    return {
        "copy": 2 * source.numel() / copy * 1e6,
        "read": source.numel() / read * 1e6,
        "matmul": 2 * 8192**3 / matmul * 1e6,
        "step_us": step,
    }


def relative(out: torch.Tensor, exact: torch.Tensor) -> float:
    out, exact = out.double(), exact.double()
    return float((out - exact).norm() / exact.norm())


def poison(t: torch.Tensor) -> torch.Tensor:
    return t.fill_(float("nan"))


def randn(*shape: int, scale: float = 1.0, seed: int = 0, dtype: torch.dtype = BF16) -> torch.Tensor:
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    return (torch.randn(shape, generator=generator, device=DEVICE) * scale).to(dtype)


def random_packed(metas: list[tuple[tuple[int, ...], torch.dtype]], fmt: str) -> list[torch.Tensor]:
    """Tensors of the right kind with sensible numbers; quantising real weights of this size would take minutes."""
    made = []
    for i, (shape, dtype) in enumerate(metas):
        if fmt == "mxfp4" and i % 2 == 1:
            t = torch.randint(117, 122, shape, device=DEVICE, dtype=torch.uint8)
        elif dtype == torch.uint8 and fmt == "int4zp" and i % 3 == 2:
            t = torch.randint(6, 10, shape, device=DEVICE, dtype=torch.uint8)
        elif dtype == torch.uint8:
            t = torch.empty(shape, dtype=torch.uint8, device=DEVICE).random_(0, 256)
        elif dtype == torch.int8:
            t = torch.empty(shape, dtype=torch.int8, device=DEVICE).random_(-127, 128)
        elif dtype == torch.float8_e4m3fn:
            t = torch.empty(shape, dtype=dtype, device=DEVICE)
            for part in t.view(-1, shape[-1]).split(1 << 16):
                part.copy_(torch.randn(part.shape, device=DEVICE) * 64)
        elif i == 0 or fmt == "model":
            t = torch.empty(shape, dtype=dtype, device=DEVICE).normal_(0, 0.02)
        else:
            size = {"int8": 3e-4, "fp8": 3e-4}.get(fmt, 5e-3)
            t = torch.rand(shape, device=DEVICE).mul_(size).add_(size / 2).to(dtype)
        made.append(t)
    return made


# -- experts
@dataclass(frozen=True)
class Model:
    H: int
    inter: int
    E: int
    K: int
    extra: tuple[tuple[str, Any], ...] = ()

    def spec(self, weights: str, E: int | None = None) -> ExpertsSpec:
        return ExpertsSpec(E or self.E, self.H, self.inter, weights=weights, **dict(self.extra))


MODELS = {
    "qwen3-30b": Model(2048, 768, 128, 8),
    "dsv2-lite": Model(2048, 1408, 64, 6),
    "gpt-oss-20b": Model(2880, 2880, 32, 4, (("gate", "clamped"), ("has_bias", True))),
    "dsv3": Model(7168, 2048, 256, 8),
}
EXPERTS = {
    "qwen3-30b": ["model", "int4", "int8", "fp8", "mxfp4"],
    "dsv2-lite": ["model", "int4", "int8", "fp8"],
    "gpt-oss-20b": ["model", "mxfp4", "int4", "int8"],
    "dsv3": ["fp8", "int4"],
}
TOKENS = [1, 16, 4096]


def experts_packed(spec: ExpertsSpec) -> list[torch.Tensor]:
    metas = [(m.shape, m.dtype) for m in packed_meta(spec, BF16)]
    bias = 2 * spec.has_bias
    many = (len(metas) - bias) // 2
    made = random_packed(metas[:many], spec.weights) + random_packed(metas[many : 2 * many], spec.weights)
    return made + random_packed(metas[2 * many :], "model")


def routing(T: int, spec: ExpertsSpec, K: int, calls: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Choices of ``calls`` steps; for few tokens the steps walk through all experts before one comes again."""
    order = torch.randperm(spec.num_experts, device=DEVICE)
    out = []
    for c in range(calls):
        if spec.num_experts >= 2 * T * K:
            ids = order.roll(-c * T * K)[: T * K].view(T, K)
        else:
            ids = torch.rand(T, spec.num_experts, device=DEVICE).topk(K).indices
        out.append((ids.contiguous(), torch.rand(T, K, device=DEVICE)))
    return out


def experts_exact(
    spec: ExpertsSpec,
    x: torch.Tensor,
    ids: torch.Tensor,
    w: torch.Tensor,
    packed: list[torch.Tensor],
    dtype: torch.dtype = BF16,
) -> torch.Tensor:
    many = (len(packed) - 2 * spec.has_bias) // 2
    rows = spec.intermediate * (1 if spec.gate == "none" else 2)
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for e in ids.unique().tolist():
        token, slot = torch.where(ids == e)
        up = dequantize(from_tensors(spec.weights, (rows, spec.hidden), [t[e] for t in packed[:many]]), dtype).double()
        down = dequantize(
            from_tensors(spec.weights, (spec.hidden, spec.intermediate), [t[e] for t in packed[many : 2 * many]]), dtype
        ).double()
        y = x[token].double() @ up.t()
        y = apply_gate(spec, y + packed[-2][e].double() if spec.has_bias else y) @ down.t()
        y = y + packed[-1][e].double() if spec.has_bias else y
        out.index_add_(0, token, y * w[token, slot, None].double())
    return out


def expert_bytes(spec: ExpertsSpec, packed: list[torch.Tensor], ids: torch.Tensor) -> float:
    return sum(t.numel() * t.element_size() for t in packed) / spec.num_experts * ids.unique().numel()


def check_experts(name: str, weights: str) -> list[Row]:
    """At few experts: every path that the timed token counts take."""
    from ktfx.triton_kernels import experts

    model = MODELS[name]
    spec = model.spec(weights, max(2 * model.K, 16))
    packed = experts_packed(spec)
    rows = []
    for T, pairs, block in (
        (1, True, 0),
        (3, True, 0),
        (7, False, 16),
        (40, False, 32),
        (60, False, 64),
        (200, False, 128),
    ):
        x = randn(T, spec.hidden, seed=T)
        ids, w = routing(T, spec, model.K, 1)[0]
        out = poison(torch.empty_like(x))
        chosen = None if pairs else experts.tiles_choice(spec, packed, block, BF16)
        experts.routed_experts(spec, x, ids, w, packed, pairs=pairs, configs=chosen, out=out)
        rows.append(
            Row(
                f"experts {name} {weights} {'pairs' if pairs else f'tiles{block}'} T={T}",
                error=relative(out, experts_exact(spec, x, ids, w, packed)),
            )
        )
    return rows


def time_experts(name: str, weights: str) -> list[Row]:
    model = MODELS[name]
    spec = model.spec(weights)
    packed = experts_packed(spec)
    rows = []
    for T in TOKENS:
        calls = 16 if T <= 4 else 4 if T <= 64 else 2
        steps = routing(T, spec, model.K, calls)
        x = randn(T, spec.hidden)
        us = graph_time([partial(TRITON_KERNEL.forward, spec, x, *s, packed) for s in steps])
        nbytes = statistics.mean(expert_bytes(spec, packed, s[0]) for s in steps)
        flops = 6.0 * T * model.K * spec.hidden * spec.intermediate
        rows.append(Row(f"experts {name} {weights} T={T}", us, nbytes, flops))
    return rows


def gathered(
    spec: ExpertsSpec, x: torch.Tensor, ids: torch.Tensor, w: torch.Tensor, packed: list[torch.Tensor]
) -> torch.Tensor:
    """Experts in plain PyTorch for few tokens: the chosen weights gathered, two batched products."""
    (T, K), flat = ids.shape, ids.view(-1)
    h = torch.bmm(packed[0][flat], x.repeat_interleave(K, 0)[:, :, None])[..., 0]
    h = apply_gate(spec, h + packed[-2][flat] if spec.has_bias else h)
    y = torch.bmm(packed[1][flat], h[:, :, None])[..., 0]
    y = y + packed[-1][flat] if spec.has_bias else y
    return (y.view(T, K, -1) * w[..., None].to(y.dtype)).sum(1)


def grouped(
    spec: ExpertsSpec, x: torch.Tensor, ids: torch.Tensor, w: torch.Tensor, packed: list[torch.Tensor]
) -> torch.Tensor:
    """Experts in plain PyTorch for many tokens: pairs sorted by expert, two grouped products. Nothing waits for the
    GPU, as ``bincount`` would, so that a CUDA graph takes it.
    """
    T, K = ids.shape
    chosen, order = ids.view(-1).sort()
    ends = torch.searchsorted(chosen, torch.arange(spec.num_experts, device=x.device), right=True, out_int32=True)
    h = torch._grouped_mm(x[order // K], packed[0].transpose(1, 2), ends)
    h = apply_gate(spec, h + packed[-2][chosen] if spec.has_bias else h)
    y = torch._grouped_mm(h, packed[1].transpose(1, 2), ends)
    y = y + packed[-1][chosen] if spec.has_bias else y
    back = torch.empty_like(y).index_copy_(0, order, y)
    return (back.view(T, K, -1) * w[..., None].to(y.dtype)).sum(1)


STOCK = ((1, gathered), (4096, grouped))


def check_experts_stock(name: str) -> list[Row]:
    model = MODELS[name]
    spec = model.spec("model", max(2 * model.K, 16))
    packed = experts_packed(spec)
    rows = []
    for T, fn in ((3, gathered), (200, grouped)):
        x = randn(T, spec.hidden, seed=T)
        ids, w = routing(T, spec, model.K, 1)[0]
        error = relative(fn(spec, x, ids, w, packed), experts_exact(spec, x, ids, w, packed))
        rows.append(Row(f"stock experts {name} {fn.__name__}", error=error))
    return rows


def event_time(calls: list[Callable[[], Any]], repeats: int = 20) -> float:
    """Microseconds a call without a graph: the calls one after another, between events."""
    times = []
    for _ in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(calls))
    return statistics.median(times[2:])


def time_experts_stock(name: str) -> list[Row]:
    """PyTorch's own experts in 16 bits, eager and compiled: replays of a graph, or without one where it takes none."""
    model = MODELS[name]
    spec = model.spec("model")
    packed = experts_packed(spec)
    rows = []
    for T, fn in STOCK:
        x = randn(T, spec.hidden)
        steps = routing(T, spec, model.K, 8 if T == 1 else 2)
        nbytes = statistics.mean(expert_bytes(spec, packed, s[0]) for s in steps)
        flops = 6.0 * T * model.K * spec.hidden * spec.intermediate
        for how in ("eager", "compile"):
            label = f"stock {how} experts {name} T={T}"
            torch._dynamo.reset()
            run = partial(fn if how == "eager" else torch.compile(fn, dynamic=False), spec, x)
            calls = [partial(run, *s, packed) for s in steps]
            try:
                rows.append(Row(label, graph_time(calls), nbytes, flops))
            except Exception as error:
                torch.cuda.synchronize()
                try:
                    rows.append(Row(label + " no graph", event_time(calls), nbytes, flops))
                except Exception:
                    rows.append(Row(label, problem=short(error)))
    return rows


# -- linear
LINEARS = {
    "qkv 5120x2048": (5120, 2048),
    "o 2048x4096": (2048, 4096),
    "dsv3 o 7168x16384": (7168, 16384),
    "head 151936x2048": (151936, 2048),
}
LINEAR_FORMATS = ["model", "int4", "int8", "fp8"]
LINEAR_ROWS = [1, 4, 16, 64, 4096]
TIMED_LINEARS = ("qkv 5120x2048", "dsv3 o 7168x16384")


def linear_packed(spec: LinearSpec) -> list[torch.Tensor]:
    return random_packed(storage(spec.weights, (spec.out_features, spec.in_features), BF16), spec.weights)


def check_linear(weights: str) -> list[Row]:
    rows = []
    for N, K in ((5120, 2048), (1000, 7168)):
        spec = LinearSpec(K, N, weights)
        packed = linear_packed(spec)
        kernel = linear_kernel("triton")
        exact_w = kernel.dequantised(spec, packed).to(BF16).double()
        for M in (*LINEAR_ROWS[:-1], 300):
            x = randn(M, K, seed=M)
            out = kernel.forward(spec, x, packed, None)
            rows.append(Row(f"linear {weights} {N}x{K} M={M}", error=relative(out, x.double() @ exact_w.t())))
    return rows


def time_linear(weights: str) -> list[Row]:
    rows = []
    for name in TIMED_LINEARS:
        N, K = LINEARS[name]
        spec = LinearSpec(K, N, weights)
        one = linear_packed(spec)
        size = sum(t.numel() * t.element_size() for t in one)
        copies = [one] + [[t.clone() for t in one] for _ in range(min(15, int(3e8 / size)))]
        for M in (1, 16, 4096):
            x = randn(M, K)
            us = graph_time([partial(linear_kernel("triton").forward, spec, x, p, None) for p in copies])
            row = Row(f"linear {name} {weights} M={M}", us, size, 2.0 * M * N * K)
            if weights == "model":
                row.extra["eager_us"] = graph_time([partial(F.linear, x, p[0]) for p in copies])
            rows.append(row)
    return rows


# -- layers of several GPUs
def check_devices() -> list[Row]:
    """A small float32 expert layer and two projections on every GPU while the first one is current, behind slow work on
    the GPU of the tensors: a kernel launched on the wrong GPU reads what is not there yet."""
    rows = []
    spec = ExpertsSpec(8, 32, 24)
    with torch.cuda.device(0):
        for index in range(torch.cuda.device_count()):
            device = torch.device("cuda", index)
            for T in (1, 7):
                packed = [randn(8, 48, 32, dtype=torch.float32, seed=1), randn(8, 32, 24, dtype=torch.float32, seed=2)]
                x0, ids = randn(T, 32, dtype=torch.float32, seed=3), torch.rand(T, 8, device=DEVICE).topk(2).indices
                w = torch.rand(T, 2, device=DEVICE)
                exact = experts_exact(spec, x0, ids, w, packed, torch.float32).to(device)
                x0, ids, w, packed = x0.to(device), ids.to(device), w.to(device), [t.to(device) for t in packed]
                busy = torch.randn(4096, 4096, device=device)
                error = 0.0
                for _ in range(20):
                    x = torch.full_like(x0, math.nan)
                    busy @ busy
                    x.copy_(x0)
                    found = relative(TRITON_KERNEL.forward(spec, x, ids, w, packed), exact)
                    error = max(error, found) if found == found else math.inf
                rows.append(Row(f"experts float32 on {device} from cuda:0 T={T}", error=error))
    return rows


# -- the rest
def small_cases() -> list[tuple[str, Callable[[], torch.Tensor], Callable[[], torch.Tensor], Callable[[], Any], float]]:
    """(name, ours, exact in float64, the same in plain PyTorch, bytes moved)."""
    ops = torch.ops.ktfx
    cases: list[Any] = []
    for T, D in ((1, 2048), (64, 7168), (4096, 2048)):
        x, r, w = randn(T, D), randn(T, D, seed=1), randn(D, seed=2)
        size = T * D * 2
        cases.append((
            f"rms_norm {T}x{D}", lambda x=x, w=w: ops.rms_norm(x, w, 1e-6, "llama"),
            lambda x=x, w=w: rms_norm_reference(x.double(), w.double(), 1e-6, "llama"),
            lambda x=x, w=w: rms_norm_reference(x, w, 1e-6, "llama"), 2 * size,
        ))  # fmt: skip
        cases.append((
            f"add_rms_norm {T}x{D}", lambda x=x, r=r, w=w: ops.add_rms_norm(x, r, w, 1e-6, "llama")[0],
            lambda x=x, r=r, w=w: rms_norm_reference((x + r).double(), w.double(), 1e-6, "llama"),
            lambda x=x, r=r, w=w: rms_norm_reference(x + r, w, 1e-6, "llama"), 4 * size,
        ))  # fmt: skip
        gu = randn(T, 2 * D)
        cases.append((
            f"silu_and_mul {T}x{D}", lambda g=gu: ops.silu_and_mul(*g.chunk(2, -1)),
            lambda g=gu: F.silu(g.double().chunk(2, -1)[0]) * g.double().chunk(2, -1)[1],
            lambda g=gu: F.silu(g.chunk(2, -1)[0]) * g.chunk(2, -1)[1], 3 * size,
        ))  # fmt: skip
    for S in (1, 4096):
        q = randn(1, S, 32, 128).transpose(1, 2)
        cos, sin = randn(1, S, 64, seed=3), randn(1, S, 64, seed=4)
        cases.append((
            f"rope 32 heads S={S}", lambda q=q, c=cos, s=sin: ops.rope(q, c, s, "half"),
            lambda q=q, c=cos, s=sin: rope_reference(q.double(), c.double(), s.double(), "half"),
            lambda q=q, c=cos, s=sin: rope_reference(q, c, s, "half"), 2 * q.numel() * 2,
        ))  # fmt: skip
    v3 = {"scoring": "sigmoid", "groups": 8, "keep_groups": 4, "group_score": "top2", "scale": 2.5, "eps": 1e-20}
    for T in (1, 4096):
        logits, bias = randn(T, 128, dtype=torch.float32), randn(256, dtype=torch.float32)
        wide = randn(T, 256, dtype=torch.float32, seed=5)
        cases.append((
            f"route qwen3 T={T}", lambda t=logits: ops.route(t, None, 8)[0],
            lambda t=logits: route_reference(t.double(), None, 8)[0],
            lambda t=logits: route_reference(t, None, 8)[0], T * 128 * 4,
        ))  # fmt: skip
        cases.append((
            f"route dsv3 T={T}", lambda t=wide, b=bias: ops.route(t, b, 8, **v3)[0],
            lambda t=wide, b=bias: route_reference(t.double(), b.double(), 8, **v3)[0],
            lambda t=wide, b=bias: route_reference(t, b, 8, **v3)[0], T * 256 * 4,
        ))  # fmt: skip
    for name, B, hq, kv, D, L, window in (
        ("qwen3", 1, 32, 4, 128, 1024, 0), ("qwen3", 1, 32, 4, 128, 32768, 0), ("qwen3", 16, 32, 4, 128, 4096, 0),
        ("gpt-oss sinks", 1, 64, 8, 64, 8192, 0), ("gpt-oss window", 1, 64, 8, 64, 8192, 128),
    ):  # fmt: skip
        q, k, v = randn(B, hq, 1, D), randn(B, kv, L + 64, D, seed=1), randn(B, kv, L + 64, D, seed=2)
        n = torch.tensor(L, device=DEVICE)
        sinks = randn(hq, seed=3) if "gpt" in name else None
        read = 2 * B * kv * (window or L) * D * 2
        cases.append((
            f"attention {name} B={B} L={L}",
            lambda q=q, k=k, v=v, n=n, s=sinks, w=window, D=D: ops.attention_decode(q, k, v, n, D**-0.5, w, s),
            lambda q=q, k=k, v=v, n=n, s=sinks, w=window, D=D: attention_decode_reference(
                q.double(), k.double(), v.double(), n, D**-0.5, w, None if s is None else s.double()
            ),
            lambda q=q, k=k, v=v, L=L: F.scaled_dot_product_attention(q, k[:, :, :L], v[:, :, :L], enable_gqa=True),
            read,
        ))  # fmt: skip
    return cases


MLA = [("dsv2-lite", 16, 1, 8192), *(("dsv3", 128, B, L) for B in (1, 16) for L in (1024, 8192, 32768))]


def mla_case(H: int, B: int, L: int) -> tuple[Any, ...]:
    """Arguments of ``ktfx::mla_decode`` over a cache of which L entries are kept and 64 are not."""
    q, qr = randn(B, H, 1, 512), randn(B, H, 1, 64, seed=1)
    c, kr = randn(B, 1, L + 64, 512, seed=2), randn(B, 1, L + 64, 64, seed=3)
    keep = (torch.arange(L + 64, device=DEVICE) < L).view(1, 1, 1, -1)
    return q, qr, c, kr, keep, 192**-0.5, torch.ops.ktfx.mask_bounds(keep)


def check_mla() -> list[Row]:
    from ktfx.triton_kernels.mla_decode import mla_decode

    rows = []
    for H in (16, 128):
        q, qr, c, kr, keep, scale, bounds = mla_case(H, 2, 1024)
        exact = mla_decode_reference(q.double(), qr.double(), c.double(), kr.double(), keep, scale)
        for BH, BL in MLA_BLOCKS:
            name = f"mla heads {BH} tile {BL} H={H}"
            try:
                out = poison(torch.empty_like(q))
                rows.append(
                    Row(name, error=relative(mla_decode(q, qr, c, kr, keep, bounds, scale, out, None, BH, BL), exact))
                )
            except Exception as error:
                rows.append(Row(name, problem=short(error)))
    return rows


MLA_BLOCKS = ((None, None), (16, 32), (16, 64), (32, 32), (32, 64), (64, 32), (64, 64))


def time_mla() -> list[Row]:
    """Each shape with the split that ktfx chooses (``own``) and with others; the two products beside it by cuBLAS."""
    from ktfx.triton_kernels.mla_decode import mla_decode

    rows = []
    for name, H, B, L in MLA:
        copies = max(1, min(16, (200 << 20) // (B * L * 1152)))  # past L2
        cases = [mla_case(H, B, L) for _ in range(copies)]
        out = torch.empty_like(cases[0][0])
        for BH, BL in MLA_BLOCKS:
            label = f"mla {name} B={B} L={L} " + ("own" if BH is None else f"{BH}x{BL}")
            try:
                calls = [partial(mla_decode, *a[:5], a[6], a[5], out, None, BH, BL) for a in cases]
                rows.append(Row(label, graph_time(calls, 0.03), B * L * 1152, 2 * B * H * L * (512 + 512 + 64)))
            except Exception as error:
                rows.append(Row(label, problem=short(error)))
        if L == 8192:
            weights = [randn(H, 256, 512, seed=i) for i in range(4)]
            x, o = randn(H, B, 128), randn(H, B, 512)
            products = [lambda w=w, x=x, o=o: (torch.bmm(x, w[:, :128]), torch.bmm(o, w[:, 128:].mT)) for w in weights]
            rows.append(Row(f"mla {name} B={B} products", graph_time(products, 0.03), H * 256 * 512 * 2))
    return rows


def check_small() -> list[Row]:
    rows = []
    for name, ours, exact, _, _ in small_cases():
        try:
            rows.append(Row(name, error=relative(ours(), exact())))
        except Exception as error:
            rows.append(Row(name, problem=short(error)))
    return rows


def time_small() -> list[Row]:
    rows = []
    for name, ours, _, plain, nbytes in small_cases():
        try:
            row = Row(name, graph_time([ours] * 20, 0.02), nbytes)
            row.extra["eager_us"] = graph_time([plain] * 20, 0.02)
            if "T=4096" in name or "4096x2048" in name or "x7168" in name:
                torch._dynamo.reset()
                row.extra["compile_us"] = graph_time([torch.compile(plain, dynamic=False)] * 20, 0.02)
            rows.append(row)
        except Exception as error:
            rows.append(Row(name, problem=short(error)))
    return rows


# -- tuning
def tune_experts(name: str, weights: str, T: int, check: bool, part: tuple[int, int] = (0, 1)) -> list[Row]:
    """Times each candidate for the first kernel beside the second as it is, then for the second. With ``check``: small,
    errors instead of times, and only every part[1]th candidate.
    """
    from ktfx.triton_kernels import experts

    model = MODELS[name]
    spec = model.spec(weights, 16 if check else None)
    packed = experts_packed(spec)
    pairs = experts.prefer_pairs(T, model.E, model.K, experts.weight_of(spec, packed, 0), BF16)
    T_run = min(T, 64) if check else T
    steps = routing(T_run, spec, model.K, 1 if check else 16 if T <= 4 else 4 if T <= 64 else 1)
    x = randn(T_run, spec.hidden)
    base = experts.default_configs(spec, packed, T, model.K, pairs, model.E)
    best, rows = list(base), []
    # What timed candidates give is compared with the first one's: some faults show only in full tiles.
    exact = experts_exact(spec, x, *steps[0], packed) if check else None
    for which in (0, 1):
        found = (math.inf, best[which])
        for i, candidate in enumerate([best[which], *experts.neighbours(best[which])]):
            if check and i % part[1] != part[0]:
                continue
            if not experts.fits(candidate, experts.weight_of(spec, packed, which), base[0]):
                continue
            pair = tuple(candidate if i == which else c for i, c in enumerate(best))
            label = f"tune {name} {weights} T={T} {'down' if which else 'up'} {candidate}"
            try:
                if check:
                    out = poison(torch.empty_like(x))
                    experts.routed_experts(spec, x, *steps[0], packed, pairs=pairs, configs=pair, out=out)
                    rows.append(Row(label, error=relative(out, exact)))
                    continue
                us = graph_time(
                    [partial(experts.routed_experts, spec, x, *s, packed, pairs, pair) for s in steps],
                    0.02,
                )
                out = experts.routed_experts(spec, x, *steps[0], packed, pairs=pairs, configs=pair)
                exact = out if exact is None else exact
                error = relative(out, exact)
                if not error < TOLERANCE:
                    rows.append(Row(label, problem=f"differs from the first candidate by {error:.1e}"))
                    continue
                config = {"config": asdict(candidate), "which": which, "pairs": pairs, "T": T}
                rows.append(Row(label, us, error=error, extra=config))
                found = min(found, (us, candidate), key=lambda f: f[0])
            except Exception as error:
                rows.append(Row(label, problem=short(error)))
        best[which] = found[1]
    if not check:
        key = experts.tuning_key(spec, T, model.K, pairs, BF16)
        gpu = torch.cuda.get_device_name()
        remember("hopper" if "H100" in gpu or "H200" in gpu else gpu, {key: [asdict(c) for c in best]}, TUNED_TABLE)
    return rows


# -- main
def short(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {' '.join([*text[:1], *text[-1:]]) if text else ''}"[:240]


TUNED = [
    ("qwen3-30b", "model", 1),
    ("qwen3-30b", "model", 4096),
    *((model, "fp8", 1) for model in ("qwen3-30b", "dsv3")),
    *(("qwen3-30b", w, T) for T in (4096, 16) for w in ("model", "int4", "fp8") if (w, T) != ("model", 4096)),
    ("gpt-oss-20b", "mxfp4", 4096),
    *(("qwen3-30b", w, 4096) for w in ("int8", "mxfp4")),
    *((model, "model", 1) for model in ("dsv2-lite", "gpt-oss-20b")),
]


def jobs(only: list[str], tune: bool) -> list[tuple[str, tuple[Any, ...]]]:
    every: list[tuple[str, tuple[Any, ...]]] = [("experts", (m, w)) for m, ws in EXPERTS.items() for w in ws]
    every += [("linear", (w,)) for w in LINEAR_FORMATS] + [("small", ()), ("mla", ())]
    every += [("stock", (m,)) for m in MODELS if "model" in EXPERTS[m]]
    if tune:
        every = [("tune", t) for t in TUNED]
    return [j for j in every if not only or any(o in " ".join(map(str, (j[0], *j[1]))) for o in only)]


def run_job(job: tuple[str, tuple[Any, ...]], check: bool, part: tuple[int, int] = (0, 1)) -> list[Row]:
    kind, args = job
    try:
        if kind == "tune":
            return tune_experts(*args, check, part)
        table = {
            "experts": (check_experts, time_experts),
            "linear": (check_linear, time_linear),
            "small": (check_small, time_small),
            "mla": (check_mla, time_mla),
            "stock": (check_experts_stock, time_experts_stock),
        }
        with torch.no_grad():
            return table[kind][0 if check else 1](*args)
    except Exception as error:
        return [Row(" ".join(map(str, (kind, *args))), problem=short(error))]
    finally:
        torch.cuda.empty_cache()


def check_in_parallel(args: argparse.Namespace, work: list[Any]) -> list[Row]:
    workers = args.workers if args.tune else min(args.workers, len(work))
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for i in range(workers):
            command = [
                sys.executable,
                __file__,
                "--out",
                folder,
                "--shard",
                f"{i}/{workers}",
                *(["--tune"] if args.tune else []),
            ]
            command += [part for name in args.only for part in ("--only", name)]
            running.append(
                subprocess.Popen(
                    command,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        stop = time.time() + args.minutes * 60 * 0.6
        rows = []
        for i, process in enumerate(running):
            try:
                _, stderr = process.communicate(timeout=max(1.0, stop - time.time()))
            except subprocess.TimeoutExpired:
                process.kill()
                stderr = "ran out of time"
            file = Path(folder) / f"shard{i}.json"
            if file.exists():
                rows += [Row(**r) for r in json.loads(file.read_text())]
            if process.returncode != 0:
                rows.append(Row(f"worker {i}", problem=stderr.strip()[-300:]))
        return rows


def run_shard(args: argparse.Namespace, work: list[Any]) -> None:
    index, count = map(int, args.shard.split("/"))
    rows: list[Row] = []
    for job in work if args.tune else work[index::count]:  # tuning is divided by candidate
        rows += run_job(job, check=True, part=(index, count))
        Path(args.out, f"shard{index}.json").write_text(json.dumps([asdict(r) for r in rows]))


def print_row(row: Row, limit: dict[str, float]) -> None:
    if row.problem:
        print(f"{row.case} FAILED {row.problem[:140]}")
        return
    line = f"{row.case:36s} {row.us:7.1f} us"
    if row.nbytes:
        line += f" {row.nbytes / row.us / 1e6:5.2f} TB/s {100 * row.nbytes / row.us * 1e6 / limit['read']:3.0f}%"
    if row.flops / max(row.nbytes, 1) > 100:
        line += f" {row.flops / row.us / 1e6:4.0f} TF {100 * row.flops / row.us * 1e6 / limit['matmul']:4.0f}%"
    print(line + "".join(f" {k[:-3]} {v:.1f}" for k, v in row.extra.items() if k.endswith("_us")), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--tune", action="store_true", help="sweep the experts' configurations instead")
    parser.add_argument("--contenders", action="store_true", help="other projects' kernels in turn with ours instead")
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--shard", default="")
    args = parser.parse_args()
    if args.contenders:
        import gpu_contenders  # it imports this file

        gpu_contenders.main(args)
        return
    began = time.time()
    work = jobs(args.only, args.tune)
    if args.shard:
        run_shard(args, work)
        return
    for row in check_devices():
        print(f"{row.case}: relative error {row.error:.1e}", flush=True)
    global TUNED_TABLE
    TUNED_TABLE = Path(args.out, SHIPPED)
    checks = check_in_parallel(args, work)
    bad = [r for r in checks if r.problem or not r.error < TOLERANCE]
    worst = max((r.error for r in checks if r.error == r.error), default=math.nan)
    good = max((r.error for r in checks if r not in bad), default=math.nan)
    print(f"{torch.cuda.get_device_name()} torch {torch.__version__}", end="; ")
    print(f"{len(checks)} checks, {len(bad)} bad, worst error of the others {good:.1e}; {time.time() - began:.0f} s")
    for r in bad[:15]:
        print(f"BAD {r.case[:110]} error {r.error:.2e} {r.problem[:160]}")
    limit = limits()
    print(f"copy {limit['copy'] / 1e12:.2f} TB/s, read {limit['read'] / 1e12:.2f} TB/s", end=", ")
    print(f"bf16 matmul {limit['matmul'] / 1e12:.0f} TFLOP/s, graph step {limit['step_us']:.2f} us", flush=True)
    rows: list[Row] = []

    def save() -> None:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        record = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "limits": limit, "worst": worst}
        record |= {"checks": [asdict(r) for r in checks], "rows": [asdict(r) for r in rows]}
        Path(args.out, "tune.json" if args.tune else "kernels.json").write_text(json.dumps(record))

    for job in work:
        name = " ".join(map(str, (job[0], *job[1])))
        if any(name in r.case and ("illegal" in r.problem or "launch failure" in r.problem) for r in bad):
            print(name, "not timed: it broke the context of its check")
            continue
        if time.time() - began > args.minutes * 60:
            print("out of time before", job)
            continue
        fresh = run_job(job, check=False)
        rows += fresh
        if args.tune:
            for which in ("up", "down"):
                timed = sorted((r for r in fresh if f" {which} " in r.case and r.us == r.us), key=lambda r: r.us)
                own = next((r for r in fresh if f" {which} " in r.case), None)
                for r in timed[:2]:
                    print(f"{r.us:8.1f} us (own {own.us if own else math.nan:8.1f}) {r.case[5:]}")
            for r in [r for r in fresh if r.problem][:2]:
                print_row(r, limit)
        else:
            for r in fresh:
                print_row(r, limit)
        save()
    save()
    print(f"{time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
