"""Other projects' GPU kernels beside ours, over the same inputs and in turn: ``gpu_kernels_table.py --contenders``.

None is a dependency; each that is missing, or fails, says so and the others go on. vLLM's wheel brings most of them
(its fused experts in Triton, Marlin, Machete, FlashAttention 3, FlashMLA, and OpenAI's triton_kernels), Liger-Kernel's
the small ones. A figure counts only if the result is within ``TOLERANCE`` of float64. What another project prepares
once (weights in its own layout, ids as int32, a schedule for the lengths at hand) is prepared outside the timing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_kernels_table as table
import torch
import torch.nn.functional as F

from ktfx.formats import parse_format, unpack_nibbles
from ktfx.ops.attention import attention_decode_reference
from ktfx.ops.experts import ExpertsSpec
from ktfx.ops.experts_triton import TRITON_KERNEL
from ktfx.ops.linear import LinearSpec, linear_kernel
from ktfx.ops.mla import mla_decode_reference
from ktfx.ops.norms import rms_norm_reference
from ktfx.ops.rope import rope_reference
from ktfx.ops.router import route_reference

TOLERANCE = 2e-2
ROUNDS = 3  # every contender is timed so many times, all of them after one another each time; medians count
EXPERTS = (
    ("qwen3-30b", ("model", "int4", "int8", "fp8")),
    ("dsv2-lite", ("model", "int4")),
    ("gpt-oss-20b", ("mxfp4", "model")),
)
PACKAGES = ("torch", "triton", "vllm", "liger-kernel")

Tensor = torch.Tensor
Call = Callable[[], Any]
Bind = Callable[[Tensor, Tensor, Tensor], Call]  # of x, ids and weights to the call over them


class Missing(Exception):
    """A contender that does not take this shape or format; its text says why."""


@dataclass
class Rival:
    """One contender: ``make`` returns the calls to time, ``check`` (else the first of them) the result to compare."""

    name: str
    make: Callable[[], list[Call]]
    check: Call | None = None


@dataclass
class Case:
    """One line of the table. exact: the result in float64; view: what is compared of either result."""

    name: str
    ours: list[Call]
    exact: Callable[[], Any]
    rivals: list[Rival]
    view: Callable[[Any], Tensor] = lambda out: out


@dataclass
class Figure:
    case: str
    name: str
    us: float = math.nan
    error: float = math.nan
    problem: str = ""
    trace: str = ""
    rounds: list[float] = field(default_factory=list)


# -- layouts
def neighbours(data: Tensor) -> Tensor:
    """Two neighbours a byte, the first one low, from ktfx's layout; everybody else's."""
    codes = unpack_nibbles(data)
    return codes[..., ::2] | codes[..., 1::2] << 4


def alternating(rows: Tensor) -> Tensor:
    """(E, 2·I, …), gate then up, to rows that alternate, as gpt-oss's checkpoint and kernels for it have them."""
    return rows.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2).contiguous()


def padded(t: Tensor, **sizes: int) -> Tensor:
    """Zeros at the end of the named dimensions (``d1=64``) up to their new size."""
    pads = [0] * (2 * t.dim())
    for name, size in sizes.items():
        dim = int(name[1:])
        pads[2 * (t.dim() - 1 - dim) + 1] = size - t.shape[dim]
    return F.pad(t, pads) if any(pads) else t


# -- experts
@dataclass(frozen=True)
class Layer:
    """Packed experts by part: up and down as their tensors, biases or None."""

    spec: ExpertsSpec
    up: list[Tensor]
    down: list[Tensor]
    up_bias: Tensor | None
    down_bias: Tensor | None

    @property
    def clamped(self) -> bool:
        return self.spec.gate == "clamped"

    @staticmethod
    def of(spec: ExpertsSpec, packed: list[Tensor]) -> Layer:
        many = (len(packed) - 2 * spec.has_bias) // 2
        biases = packed[2 * many :] if spec.has_bias else [None, None]
        return Layer(spec, packed[:many], packed[many : 2 * many], *biases)

    def arranged(self, part: Tensor) -> Tensor:
        """Rows of up as the contenders' activation takes them."""
        return alternating(part) if self.clamped else part


def activation(layer: Layer) -> Any:
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    return MoEActivation.SWIGLUOAI if layer.clamped else MoEActivation.SILU


def vllm_triton(layer: Layer) -> Bind:
    """vLLM's fused experts in Triton over bf16, int8 and int4, with the configurations it ships for this GPU."""
    import vllm._custom_ops  # noqa: F401
    from vllm.model_executor.layers.fused_moe import config as configs
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    kind, group = parse_format(layer.spec.weights)
    if kind.name not in ("model", "int4", "int8"):
        raise Missing(f"multiplies {kind.name} by rounded activations only")
    up, down = layer.arranged(layer.up[0]), layer.down[0]
    biases = None if layer.up_bias is None else layer.arranged(layer.up_bias)
    if kind.name == "model":
        quant = configs.biased_moe_quant_config(biases, layer.down_bias)
    elif kind.name == "int8":
        quant = configs.int8_w8a16_moe_quant_config(layer.arranged(layer.up[1]), layer.down[1], w1_bias=biases)
    else:
        up, down = neighbours(up), neighbours(down)
        scales = layer.arranged(layer.up[1]), layer.down[1]
        quant = configs.int4_w4a16_moe_quant_config(*scales, w1_bias=biases, block_shape=[0, group])
    act = activation(layer)

    def forward(x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        return fused_experts(x, up, down, w, ids, activation=act, quant_config=quant)

    return partial(partial, forward)


def marlin(layer: Layer) -> Bind:
    """Marlin's experts over int4, fp8 and mxfp4, as vLLM calls it."""
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe
    from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_make_workspace_new
    from vllm.scalar_type import scalar_types

    kind = parse_format(layer.spec.weights)[0].name
    types = {"int4": "uint4b8", "fp8": "float8_e4m3fn", "mxfp4": "float4_e2m1f"}
    if kind not in types:
        raise Missing(f"no {kind}")
    number = getattr(scalar_types, types[kind]).id
    prepare = {"int4": marlin_int4, "fp8": marlin_fp8, "mxfp4": marlin_mxfp4}[kind]
    up, down, up_scales, down_scales, up_bias, down_bias = prepare(layer)
    workspace = marlin_make_workspace_new(up.device, 4)
    act, hidden, wide = activation(layer), layer.spec.hidden, up.shape[1] * 16

    def total(parts: Tensor, out: Tensor, *_: Any) -> Tensor:
        ops.moe_sum(parts, out)
        return out

    def forward(x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        x = padded(x, d1=wide)
        weights = (up, down, up_bias, down_bias, up_scales, down_scales)
        options = {"activation": act, "moe_sum": total, "workspace": workspace}
        return fused_marlin_moe(x, *weights, w, ids, quant_type_id=number, **options)[:, :hidden]

    return partial(partial, forward)


def marlin_int4(layer: Layer) -> tuple[Any, ...]:
    from vllm.model_executor.layers.quantization.utils import marlin_utils as utils
    from vllm.model_executor.layers.quantization.utils.marlin_utils_fp4 import _repack_marlin_experts

    spec, group = layer.spec, parse_format(layer.spec.weights)[1]
    if layer.clamped:
        raise Missing("int4 of this layer would have to be padded")
    perm = torch.empty(0, dtype=torch.int, device=layer.up[0].device)
    weights, scales = [], []
    for (data, scale), N, K in (
        (layer.up, spec.up_rows, spec.hidden),
        (layer.down, spec.hidden, spec.intermediate),
    ):
        weights.append(_repack_marlin_experts(neighbours(data), N, K, perm, False))
        scales.append(utils.marlin_moe_permute_scales(scale.transpose(1, 2).contiguous(), K, N, group))
    return *weights, *scales, None, None


def marlin_fp8(layer: Layer) -> tuple[Any, ...]:
    from vllm.model_executor.layers.quantization.utils import marlin_utils_fp8 as utils

    spec = layer.spec
    sizes = {"num_experts": spec.num_experts, "hidden_size": spec.hidden}
    sizes["intermediate_size_per_partition"] = spec.intermediate
    stub = SimpleNamespace(**sizes, weight_block_size=[128, 128], orig_dtype=table.BF16, w13_weight=layer.up[0])
    parts = (layer.up[0], layer.down[0], layer.up[1], layer.down[1])
    return *utils.prepare_fp8_moe_layer_for_marlin(stub, *parts), None, None


def marlin_mxfp4(layer: Layer) -> tuple[Any, ...]:
    """Sizes go up to what Marlin takes: hidden to a multiple of 128, as vLLM does for gpt-oss."""
    from vllm.model_executor.layers.quantization.utils.marlin_utils_fp4 import prepare_moe_mxfp4_layer_for_marlin

    spec = layer.spec
    H = -(-spec.hidden // 128) * 128
    up, up_scales = (layer.arranged(t) for t in (neighbours(layer.up[0]), layer.up[1]))
    up, up_scales = padded(up, d2=H // 2), padded(up_scales, d2=H // 32)
    down, down_scales = padded(neighbours(layer.down[0]), d1=H), padded(layer.down[1], d1=H)
    up_bias = None if layer.up_bias is None else layer.arranged(layer.up_bias)
    down_bias = None if layer.down_bias is None else padded(layer.down_bias, d1=H)
    stub = SimpleNamespace(params_dtype=table.BF16)
    return prepare_moe_mxfp4_layer_for_marlin(stub, up, down, up_scales, down_scales, up_bias, down_bias)


def openai(layer: Layer, grouped_before: bool = False) -> Bind:
    """OpenAI's triton_kernels (matmul_ogs) over bf16 and mxfp4, as vLLM carries and calls it.

    grouped_before: its two products alone; its own router groups pairs by expert along with choosing them.
    """
    from vllm.model_executor.layers.fused_moe.experts import gpt_oss_triton_kernels_moe as theirs

    multiply, fused, ops = theirs.matmul_ogs, openai_gate(layer), torch.ops._C
    up, up_precision = openai_weight(layer, layer.up, True)
    down, down_precision = openai_weight(layer, layer.down, False)
    biases: tuple[Any, Any] = (None, None)
    if layer.up_bias is not None and layer.down_bias is not None:
        biases = layer.arranged(layer.up_bias).float(), layer.down_bias.float()
    group = partial(theirs.make_routing_data, num_local_experts=layer.spec.num_experts)

    def products(x: Tensor, route: Any, gather: Any, scatter: Any) -> Tensor:
        h = multiply(x, up, biases[0], route, gather, precision_config=up_precision, fused_activation=fused)
        if fused is None:
            gated = h.new_empty(h.shape[0], layer.spec.intermediate)
            ops.silu_and_mul(gated, h)
            h = gated
        options = {"scatter_indx": scatter, "precision_config": down_precision, "gammas": route.gate_scal}
        return multiply(h, down, biases[1], route, **options)

    if grouped_before:
        return lambda x, ids, w: partial(products, x, *group(ids, w))
    return lambda x, ids, w: lambda: products(x, *group(ids, w))


def openai_gate(layer: Layer) -> Any:
    """gpt-oss's gate is part of its product; another's is not."""
    if not layer.clamped:
        return None
    import triton_kernels.swiglu
    from triton_kernels.matmul_ogs import FnSpecs, FusedActivation

    spec = FnSpecs("swiglu", triton_kernels.swiglu.swiglu_fn, ("alpha", "limit"))
    return FusedActivation(spec, (layer.spec.alpha, layer.spec.limit), 2)


def openai_weight(layer: Layer, part: list[Tensor], is_up: bool) -> tuple[Any, Any]:
    arrange = layer.arranged if is_up else lambda t: t
    kind = parse_format(layer.spec.weights)[0].name
    if kind == "model":
        return arrange(part[0]).transpose(1, 2), None
    if kind != "mxfp4":
        raise Missing(f"no {kind}")
    from triton_kernels.matmul_ogs import FlexCtx, PrecisionConfig
    from vllm.model_executor.layers.quantization.utils.mxfp4_utils import _swizzle_mxfp4

    weight, flex, scale = _swizzle_mxfp4(arrange(neighbours(part[0])), arrange(part[1]))
    return weight, PrecisionConfig(weight_scale=scale, flex_ctx=FlexCtx(rhs_data=flex))


EXPERT_RIVALS: dict[str, Callable[[Layer], Bind]] = {
    "vLLM Triton": vllm_triton,
    "Marlin": marlin,
    "triton_kernels": openai,
    "triton_kernels, products": partial(openai, grouped_before=True),
}


def once(make: Callable[[], Any]) -> Callable[[], Any]:
    """The value of ``make``, made at the first call and kept; what it raises is raised again."""
    kept: list[Any] = []

    def get() -> Any:
        if not kept:
            try:
                kept.append((make(), None))
            except Exception as error:
                kept.append((None, error))
        value, failure = kept[0]
        if failure is not None:
            raise failure
        return value

    return get


def expert_cases(model_name: str, weights: str) -> Iterator[Case]:
    model = table.MODELS[model_name]
    spec = model.spec(weights)
    packed = table.experts_packed(spec)
    layer = Layer.of(spec, packed)
    prepared = {name: once(partial(make, layer)) for name, make in EXPERT_RIVALS.items()}

    def calls(name: str, x: Tensor, narrow: list[Any]) -> list[Call]:
        return [prepared[name]()(x, *step) for step in narrow]

    for T in table.TOKENS:
        steps = table.routing(T, spec, model.K, 16 if T <= 4 else 4 if T <= 64 else 2)
        x, narrow = table.randn(T, spec.hidden), [(ids.int(), w) for ids, w in steps]
        yield Case(
            f"experts {model_name} {weights} T={T}",
            [partial(TRITON_KERNEL.forward, spec, x, *s, packed) for s in steps],
            partial(table.experts_exact, spec, x, *steps[0], packed),
            [Rival(name, partial(calls, name, x, narrow)) for name in prepared],
        )


# -- linear layers
def marlin_linear(spec: LinearSpec, packed: list[Tensor]) -> Callable[[Tensor], Tensor]:
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.quantization.utils import marlin_utils as utils
    from vllm.scalar_type import scalar_types

    N, K, group = spec.out_features, spec.in_features, parse_format(spec.weights)[1]
    empty = torch.empty(0, dtype=torch.int, device=packed[0].device)
    code = neighbours(packed[0]).view(torch.int32).t().contiguous()
    weight = ops.gptq_marlin_repack(code, empty, K, N, 4)
    scales = utils.marlin_permute_scales(packed[1].t().contiguous(), K, N, group)
    workspace = utils.marlin_make_workspace_new(packed[0].device)

    def forward(x: Tensor) -> Tensor:
        return utils.apply_gptq_marlin_linear(
            x, weight, scales, empty, empty, empty, workspace, scalar_types.uint4b8, N, K, is_k_full=True
        )

    return forward


def marlin_linear_fp8(spec: LinearSpec, packed: list[Tensor]) -> Callable[[Tensor], Tensor]:
    from vllm.model_executor.layers.quantization.utils import marlin_utils_fp8 as utils

    N, K = spec.out_features, spec.in_features
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(packed[0], requires_grad=False)
    layer.weight_scale_inv = torch.nn.Parameter(packed[1], requires_grad=False)
    sizes = {"output_size_per_partition": N, "input_size_per_partition": K}
    for name, value in (sizes | {"weight_block_size": [128, 128], "orig_dtype": table.BF16}).items():
        setattr(layer, name, value)
    utils.prepare_fp8_layer_for_marlin(layer, size_k_first=False)
    scale = layer.weight_scale_inv
    return lambda x: utils.apply_fp8_marlin_linear(x, layer.weight, scale, layer.workspace, N, K, None)


def machete_linear(spec: LinearSpec, packed: list[Tensor]) -> Callable[[Tensor], Tensor]:
    from vllm import _custom_ops as ops
    from vllm.scalar_type import scalar_types

    group, kind = parse_format(spec.weights)[1], scalar_types.uint4b8
    code = neighbours(packed[0]).view(torch.int32).t()  # (K/8, N) with K the dense dimension
    weight = ops.machete_prepack_B(code, a_type=table.BF16, b_type=kind, group_scales_type=table.BF16)
    scales = packed[1].t().contiguous()
    return lambda x: ops.machete_mm(x, weight, kind, b_group_scales=scales, b_group_size=group)


def cublas(spec: LinearSpec, packed: list[Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: F.linear(x, packed[0])


LINEAR_RIVALS: dict[str, dict[str, Any]] = {
    "model": {"cuBLAS": cublas},
    "int4": {"Marlin": marlin_linear, "Machete": machete_linear},
    "fp8": {"Marlin": marlin_linear_fp8},
}


def linear_cases() -> Iterator[Case]:
    for weights in LINEAR_RIVALS:
        for name in table.TIMED_LINEARS:
            yield from linear_rows(name, weights)


def linear_rows(name: str, weights: str) -> Iterator[Case]:
    N, K = table.LINEARS[name]
    spec = LinearSpec(K, N, weights)
    one = table.linear_packed(spec)
    size = sum(t.numel() * t.element_size() for t in one)
    copies = [one] + [[t.clone() for t in one] for _ in range(min(15, int(3e8 / size)))]
    ours = linear_kernel("triton")
    exact = ours.dequantised(spec, one).to(table.BF16).double().t()

    def prepare(make: Any) -> list[Any]:
        return [make(spec, packed) for packed in copies]

    prepared = {rival: once(partial(prepare, make)) for rival, make in LINEAR_RIVALS[weights].items()}

    def calls(rival: str, x: Tensor) -> list[Call]:
        return [partial(forward, x) for forward in prepared[rival]()]

    for M in (1, 16, 4096):
        x = table.randn(M, K)
        yield Case(
            f"linear {name} {weights} M={M}",
            [partial(ours.forward, spec, x, p, None) for p in copies],
            partial(torch.matmul, x.double(), exact),
            [Rival(rival, partial(calls, rival, x)) for rival in prepared],
        )


# -- norms, gates, rope, routers
REPEATS = 20  # of one small call a graph


def repeated(get: Callable[[], Callable[..., Any]], *args: Any) -> Callable[[], list[Call]]:
    """What a Rival makes of a kernel that ``get`` imports."""
    return lambda: [partial(get(), *args)] * REPEATS


def norm_cases() -> Iterator[Case]:
    for T, D in ((1, 2048), (64, 7168), (4096, 2048)):
        yield from norms(T, D)


def norms(T: int, D: int) -> Iterator[Case]:
    x, r, w, both = table.randn(T, D), table.randn(T, D, seed=1), table.randn(D, seed=2), table.randn(T, 2 * D)
    ours = torch.ops.ktfx
    yield Case(
        f"rms_norm {T}x{D}",
        [partial(ours.rms_norm, x, w, 1e-6, "llama")] * REPEATS,
        lambda: rms_norm_reference(x.double(), w.double(), 1e-6, "llama"),
        [Rival("vLLM", repeated(vllm_norm, x, w)), Rival("Liger", repeated(liger_norm, x, w))],
    )

    def in_place() -> list[Call]:
        """What it overwrites stays finite: a norm, and a sum that grows by it."""
        return repeated(vllm_add_norm, x.clone(), r.clone(), w)()

    yield Case(
        f"add_rms_norm {T}x{D}",
        [partial(ours.add_rms_norm, x, r, w, 1e-6, "llama")] * REPEATS,
        lambda: rms_norm_reference((x + r).double(), w.double(), 1e-6, "llama"),
        [
            Rival("vLLM, in place", in_place, lambda: in_place()[0]()),
            Rival("Liger", repeated(liger_add_norm, x, r, w)),
        ],
        first,
    )
    yield Case(
        f"silu_and_mul {T}x{D}",
        [lambda: ours.silu_and_mul(*both.chunk(2, -1))] * REPEATS,
        lambda: F.silu(both.double()[:, :D]) * both.double()[:, D:],
        [Rival("vLLM", repeated(vllm_gate, both)), Rival("Liger", repeated(liger_gate, both))],
    )


def first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple | list) else out


def vllm_norm() -> Callable[..., Tensor]:
    import vllm._custom_ops as ops

    def call(x: Tensor, w: Tensor) -> Tensor:
        out = torch.empty_like(x)
        ops.rms_norm(out, x, w, 1e-6)
        return out

    return call


def vllm_add_norm() -> Callable[..., Tensor]:
    import vllm._custom_ops as ops

    def call(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        ops.fused_add_rms_norm(x, r, w, 1e-6)
        return x

    return call


def vllm_gate() -> Callable[..., Tensor]:
    import vllm._custom_ops  # noqa: F401

    def call(both: Tensor) -> Tensor:
        out = both.new_empty(both.shape[0], both.shape[1] // 2)
        torch.ops._C.silu_and_mul(out, both)
        return out

    return call


def liger_norm() -> Callable[..., Tensor]:
    from liger_kernel.ops.rms_norm import rms_norm_forward

    return lambda x, w: rms_norm_forward(x, w, 1e-6, 0.0, "llama", None)[0]


def liger_add_norm() -> Callable[..., Tensor]:
    from liger_kernel.ops.fused_add_rms_norm import fused_add_rms_norm_forward

    return lambda x, r, w: fused_add_rms_norm_forward(x, r, w, 1e-6, 0.0, "llama")[0]


def liger_gate() -> Callable[..., Tensor]:
    from liger_kernel.ops.swiglu import swiglu_fused_gate_up_forward

    return lambda both: swiglu_fused_gate_up_forward(both)[1]


def rope_cases() -> Iterator[Case]:
    for S in (1, 4096):
        yield rope_case(S)


def rope_case(S: int) -> Case:
    """Both contenders turn their input in place, vLLM by a table of positions and Liger a key of one head as well."""
    q = table.randn(1, S, 32, 128).transpose(1, 2)
    angle = torch.rand(1, S, 64, device=table.DEVICE) * 6.28
    cos, sin = angle.cos().to(table.BF16), angle.sin().to(table.BF16)

    def vllm() -> list[Call]:
        from vllm import _custom_ops as ops

        rows, lookup = q.transpose(1, 2).reshape(S, -1).clone(), torch.cat((cos, sin), -1)[0].contiguous()
        position = torch.arange(S, device=table.DEVICE)

        def call() -> Tensor:
            ops.rotary_embedding(position, rows, None, 128, lookup, True)
            return rows.view(1, S, 32, 128).transpose(1, 2)

        return [call] * REPEATS

    def liger() -> list[Call]:
        from liger_kernel.ops.rope import rope_forward

        mine = q.transpose(1, 2).clone().transpose(1, 2)
        key = mine[:, :1].transpose(1, 2).clone().transpose(1, 2)
        wide = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
        return [lambda: rope_forward(mine, key, *wide)[0]] * REPEATS

    return Case(
        f"rope 32 heads S={S}",
        [partial(torch.ops.ktfx.rope, q, cos, sin, "half")] * REPEATS,
        lambda: rope_reference(q.double(), cos.double(), sin.double(), "half"),
        [
            Rival("vLLM, in place", vllm, lambda: vllm()[0]()),
            Rival("Liger, in place", liger, lambda: liger()[0]()),
        ],
    )


V3 = {"scoring": "sigmoid", "groups": 8, "keep_groups": 4, "group_score": "top2", "scale": 2.5, "eps": 1e-20}


def route_cases() -> Iterator[Case]:
    for T in (1, 4096):
        yield from routes(T)


def routes(T: int) -> Iterator[Case]:
    logits, bias = table.randn(T, 128, dtype=torch.float32), table.randn(256, dtype=torch.float32)
    wide = table.randn(T, 256, dtype=torch.float32, seed=5)

    def softmax() -> list[Call]:
        from vllm import _custom_ops as ops

        def call() -> Tensor:
            weights = logits.new_empty(T, 8)
            ids, rows = (torch.empty_like(weights, dtype=torch.int32) for _ in range(2))
            ops.topk_softmax(weights, ids, rows, logits, True)
            return weights

        return [call] * REPEATS

    def grouped() -> list[Call]:
        from vllm import _custom_ops as ops

        return [partial(ops.grouped_topk, wide, 8, 4, 8, True, 2.5, bias, 1)] * REPEATS

    ours = torch.ops.ktfx.route
    yield Case(
        f"route qwen3 T={T}",
        [partial(ours, logits, None, 8)] * REPEATS,
        lambda: route_reference(logits.double(), None, 8),
        [Rival("vLLM", softmax)],
        sorted_weights,
    )
    yield Case(
        f"route dsv3 T={T}",
        [partial(ours, wide, bias, 8, **V3)] * REPEATS,
        lambda: route_reference(wide.double(), bias.double(), 8, **V3),
        [Rival("vLLM", grouped)],
        sorted_weights,
    )


def sorted_weights(out: Any) -> Tensor:
    """Weights by size: some give a token's experts in another order."""
    return first(out).sort(-1).values


# -- attention
def attention_cases() -> Iterator[Case]:
    for name, B, hq, kv, D, L, window in (
        ("qwen3", 1, 32, 4, 128, 1024, 0),
        ("qwen3", 1, 32, 4, 128, 32768, 0),
        ("qwen3", 16, 32, 4, 128, 4096, 0),
        ("gpt-oss sinks", 1, 64, 8, 64, 8192, 0),
        ("gpt-oss window", 1, 64, 8, 64, 8192, 128),
    ):
        sinks = table.randn(hq, seed=99) if "gpt" in name else None
        yield attention_case(f"attention {name} B={B} L={L}", table.randn(B, hq, 1, D), kv, L, window, sinks)


def attention_case(name: str, q: Tensor, kv: int, L: int, window: int, sinks: Tensor | None) -> Case:
    """Over enough caches that L2 does not help; FlashAttention 3 over pages of 16, as vLLM keeps them."""
    B, _, _, D = q.shape
    n, many = torch.tensor(L, device=table.DEVICE), (200 << 20) // (4 * B * kv * (window or L) * D)
    caches = [[table.randn(B, kv, L + 64, D, seed=2 * i + j) for j in (1, 2)] for i in range(max(1, min(16, many)))]

    def exact() -> Tensor:
        wide = None if sinks is None else sinks.double()
        return attention_decode_reference(q.double(), *(t.double() for t in caches[0]), n, D**-0.5, window, wide)

    return Case(
        name,
        [partial(torch.ops.ktfx.attention_decode, q, *c, n, D**-0.5, window, sinks) for c in caches],
        exact,
        [Rival("FlashAttention 3", partial(flash_attention, q, caches, L, window, sinks))],
        lambda out: out.reshape(B, -1),
    )


def flash_attention(q: Tensor, caches: list[list[Tensor]], L: int, window: int, sinks: Tensor | None) -> list[Call]:
    from vllm.vllm_flash_attn import flash_attn_interface as flash

    (B, hq, _, D), kv, page = q.shape, caches[0][0].shape[1], 16
    lengths = torch.full((B,), L, dtype=torch.int32, device=q.device)
    starts = torch.arange(B + 1, dtype=torch.int32, device=q.device)
    limits = [window - 1, 0] if window else [-1, -1]
    # vLLM makes the schedule once a step for all layers
    options = {"page_size": page, "cu_seqlens_q": starts, "causal": True, "window_size": limits}
    plan = flash.get_scheduler_metadata(B, 1, L, hq, kv, D, lengths, **options)
    calls: list[Call] = []
    for keys, values in caches:
        pages = [t.transpose(1, 2).reshape(-1, page, kv, D).contiguous() for t in (keys, values)]
        blocks = torch.arange(pages[0].shape[0], dtype=torch.int32, device=q.device).view(B, -1)
        given = {"seqused_k": lengths, "softmax_scale": D**-0.5, "causal": True, "window_size": limits}
        given |= {"block_table": blocks, "scheduler_metadata": plan, "fa_version": 3, "s_aux": sinks}
        calls.append(partial(flash.flash_attn_varlen_func, q[:, :, 0], *pages, 1, starts, L, **given))
    return calls


def mla_cases() -> Iterator[Case]:
    for name, H, B, L in table.MLA:
        yield mla_case(f"mla {name} B={B} L={L}", H, B, L)


def mla_case(name: str, H: int, B: int, L: int) -> Case:
    from ktfx.triton_kernels.mla_decode import mla_decode

    copies = max(1, min(16, (200 << 20) // (B * L * 1152)))
    cases = [table.mla_case(H, B, L) for _ in range(copies)]
    out = torch.empty_like(cases[0][0])

    def exact() -> Tensor:
        """One sequence after another: the reference copies the cache for every head."""
        *tensors, keep, scale, _ = cases[0]
        return torch.cat(
            [mla_decode_reference(*(t[b : b + 1].double() for t in tensors), keep, scale) for b in range(B)]
        )

    return Case(
        name,
        [partial(mla_decode, *a[:5], a[6], a[5], out, None) for a in cases],
        exact,
        [Rival("FlashMLA", partial(flash_mla, cases, L))],
        lambda out: first(out).reshape(B, -1, 512),
    )


def flash_mla(cases: list[tuple[Any, ...]], L: int) -> list[Call]:
    from vllm.third_party.flashmla import flash_mla_interface as flash

    plan, _ = flash.get_mla_metadata()  # one for all: the lengths are the same
    calls: list[Call] = []
    for q, qr, c, kr, _, scale, _ in cases:
        B = q.shape[0]
        query = torch.cat((q, qr), -1).transpose(1, 2).contiguous()
        pages = torch.cat((c, kr), -1).reshape(-1, 64, 1, 576).contiguous()
        blocks = torch.arange(pages.shape[0], dtype=torch.int32, device=q.device).view(B, -1)
        lengths = torch.full((B,), L, dtype=torch.int32, device=q.device)
        given = (query, pages, blocks, lengths, 512, plan)
        calls.append(partial(flash.flash_mla_with_kvcache, *given, softmax_scale=scale))
    return calls


# -- measuring
FAMILIES: dict[str, Callable[..., Iterator[Case]]] = {
    "experts": expert_cases,
    "linear": linear_cases,
    "norm": norm_cases,
    "rope": rope_cases,
    "route": route_cases,
    "attention": attention_cases,
    "mla": mla_cases,
}


def jobs(only: list[str]) -> list[tuple[str, tuple[str, ...]]]:
    every: list[tuple[str, tuple[str, ...]]] = [("experts", (m, w)) for m, ws in EXPERTS for w in ws]
    every += [(name, ()) for name in FAMILIES if name != "experts"]
    return [j for j in every if not only or any(o in " ".join((j[0], *j[1])) for o in only)]


def measured(case: Case, timed: bool, failed: dict[tuple[str, str], str]) -> list[Figure]:
    """Ours first. Errors, and with ``timed`` the times of all that work, in turn. failed: what is not to be tried."""
    figures: list[Figure] = []
    calls: list[list[Call]] = []
    exact = case.view(case.exact())
    for rival in [Rival("ktfx", lambda: case.ours), *case.rivals]:
        figure, made = Figure(case.name, rival.name, problem=failed.get((case.name, rival.name), "")), list[Call]()
        figures.append(figure)
        calls.append(made)
        if figure.problem:
            continue
        try:
            made += rival.make()
            out = case.view((rival.check or made[0])())
            torch.cuda.synchronize()
            figure.error = table.relative(out, exact)
            if not figure.error < TOLERANCE:
                figure.problem = f"relative error {figure.error:.1e}"
        except Exception as error:
            figure.problem, figure.trace = table.short(error), traceback.format_exc()
    order = list(zip(figures, calls, strict=True))
    for turn in range(ROUNDS if timed else 0):
        # each time another one goes first: a long case warms the GPU, whose clock falls
        for figure, made in order[turn % len(order) :] + order[: turn % len(order)]:
            if not figure.problem:
                time_round(figure, made)
    return figures


def time_round(figure: Figure, calls: list[Call]) -> None:
    try:
        figure.rounds.append(table.graph_time(calls, 0.04))
        figure.us = statistics.median(figure.rounds)
    except Exception as error:
        figure.problem, figure.trace = table.short(error), traceback.format_exc()


def run(job: tuple[str, tuple[str, ...]], timed: bool, failed: dict[tuple[str, str], str]) -> Iterator[list[Figure]]:
    name = " ".join((job[0], *job[1]))
    try:
        with torch.no_grad():
            for case in FAMILIES[job[0]](*job[1]):
                yield measured(case, timed, failed)
    except Exception as error:
        yield [Figure(name, "ktfx", problem=table.short(error), trace=traceback.format_exc())]
    finally:
        torch.cuda.empty_cache()


def show(figures: list[Figure]) -> None:
    ours = figures[0]
    for f in figures:
        if f.problem.startswith(Missing.__name__):
            continue
        if f.problem:
            text = f"FAILED {f.problem}"
        else:
            ratio = "" if f is ours else f" {f.us / ours.us:5.2f} x ktfx"
            text = f"{f.us:8.1f} us{ratio}, error {f.error:.1e}"
        print(f"{f.case:34s} {f.name:22s} {text}", flush=True)


def versions() -> str:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} missing")
    return ", ".join(found)


def save(folder: str, name: str, figures: list[Figure]) -> None:
    """Numbers to NAME.json, what went wrong in full to NAME.log."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, f"{name}.json").write_text(json.dumps([asdict(f) | {"trace": ""} for f in figures]))
    traces = [
        f"== {f.case}, {f.name}\n{f.trace}" for f in figures if f.trace and not f.problem.startswith(Missing.__name__)
    ]
    Path(folder, f"{name}.log").write_text("\n".join(traces))


def warm(args: argparse.Namespace, work: list[Any]) -> dict[tuple[str, str], str]:
    """Every case once in parallel processes, which compile into Triton's cache; returns what failed there."""
    command = [sys.executable, table.__file__, "--contenders", "--out", args.out]
    command += [part for name in args.only for part in ("--only", name)]
    count = min(args.workers, len(work))
    running = [
        subprocess.Popen([*command, "--shard", f"{i}/{count}"], env={**os.environ, "OMP_NUM_THREADS": "1"})
        for i in range(count)
    ]
    stop = time.time() + args.minutes * 60 * 0.6
    for process in running:
        try:
            process.wait(max(1.0, stop - time.time()))
        except subprocess.TimeoutExpired:
            process.kill()
    checks = [Figure(**f) for file in Path(args.out).glob("check*.json") for f in json.loads(file.read_text())]
    return {(f.case, f.name): f.problem for f in checks if f.problem}


def main(args: argparse.Namespace) -> None:
    began = time.time()
    os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "0")
    work = jobs(args.only)
    figures: list[Figure] = []
    if args.shard:
        index, count = map(int, args.shard.split("/"))
        for job in work[index::count]:
            for found in run(job, False, {}):
                figures += found
                save(args.out, f"check{index}", figures)
        return
    failed = warm(args, work)
    print(f"{torch.cuda.get_device_name()}, {versions()}; warm after {time.time() - began:.0f} s", flush=True)
    for job in work:
        if time.time() - began > args.minutes * 60:
            print("out of time before", *job)
            continue
        for found in run(job, True, failed):
            show(found)
            figures += found
            save(args.out, "contenders", figures)
    print(f"{time.time() - began:.0f} s")
