"""``experts.cpu``: the routed experts on the host, by the native kernels where they are built, else by ATen.

The ATen path keeps weights as ``ktfx/formats.py`` stores them and runs one grouped loop over the experts that got a
token. It is correct everywhere and fast nowhere; ``cpu_kernels_status`` says which path this process has.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from ktfx.cpu_kernels import library
from ktfx.errors import HostCallError, KtfxError, KtfxWarning
from ktfx.formats import dequantize, from_tensors, parse_format, quantize, storage
from ktfx.ops import experts_native
from ktfx.ops.experts import (
    ExpertsKernel,
    ExpertsSpec,
    TensorMeta,
    apply_gate,
    plain_layout,
    register_experts_kernel,
    stored_parts,
)

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class CpuKernelsStatus:
    """What runs ``experts.cpu`` in this process.

    path: ``native`` or ``aten``. detail: why, in words. isa, threads, shares: of the native kernels, else empty and 0.
    """

    path: str
    detail: str
    isa: str = ""
    threads: int = 0
    shares: int = 0

    def __str__(self) -> str:
        if self.path == "aten":
            return f"experts.cpu: ATen ({self.detail})"
        return f"experts.cpu: native, {self.detail}; {self.threads} threads in {self.shares} NUMA share(s)"


def cpu_kernels_status() -> CpuKernelsStatus:
    """The line that ``ktfx doctor`` prints about the CPU kernels."""
    loaded = library.load()
    if loaded.library is None:
        return CpuKernelsStatus("aten", loaded.reason)
    isa = loaded.library.ktfx_isa().decode()
    return CpuKernelsStatus(
        "native", f"{isa} kernels", isa, loaded.library.ktfx_threads(), loaded.library.ktfx_shares()
    )


def activations_used(spec: ExpertsSpec) -> str:
    """What the native kernels turn x into: ``float32``, ``int16 per 64``, ``int16 per 32`` or ``int8 per 32``.

    int8 happens only where the spec allows it and weights have 4 bits, and only to x: h stays int16, since rounding it
    too would add more than 1 %. int16 per block is exact to 2⁻¹⁶ of the block's largest value, finer than bfloat16.
    """
    form, group = parse_format(spec.weights)
    if form.name in ("model", "fp8"):
        return "float32"
    if form.bits == 4 and spec.activations == "int8":
        return "int8 per 32"
    return f"int16 per {32 if group == 32 else 64}"


@cache
def _warn_once() -> None:
    warnings.warn(
        f"experts.cpu runs on ATen, several times slower than its own kernels: {library.load().reason}",
        KtfxWarning,
        stacklevel=2,
    )


def _is_native() -> bool:
    return library.load().library is not None


def check_ids(ids_TK: torch.Tensor, num_experts: int) -> None:
    """Raise HostCallError if an expert id is outside [0, num_experts)."""
    if ids_TK.numel():
        low, high = (int(t) for t in torch.aminmax(ids_TK))
        if low < 0 or high >= num_experts:
            raise HostCallError(
                f"expert id {low if low < 0 else high} is outside [0, {num_experts})",
                expected="ids from the router of the same model",
                mend="check the router's output, or num_experts of the placed module",
            )


def aten_experts(
    spec: ExpertsSpec,
    x_TH: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    packed: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Tokens sorted by expert, one pair of matmuls for each expert that got any; sums in float32, returns x's dtype.

    packed: what the ATen path's ``pack`` made: ``formats.QuantizedWeight.tensors()`` of gate_up and of down, biases.
    """
    check_ids(ids_TK, spec.num_experts)
    out_TH = torch.zeros(x_TH.shape, dtype=torch.float32)
    order_S = ids_TK.flatten().argsort(stable=True)
    token_S = order_S // max(ids_TK.shape[1], 1)
    weight_S1 = weights_TK.flatten()[order_S].float()[:, None]
    counts = torch.bincount(ids_TK.flatten(), minlength=spec.num_experts).tolist()
    canonical, dtype, begin = spec.canonical(), x_TH.dtype, 0
    for e, count in enumerate(counts):
        if not count:
            continue
        chosen = slice(begin, begin + count)
        begin += count
        rows = {name: t.to(dtype) for name, t in _aten_weights(spec, packed, e).items()}
        up = F.linear(x_TH[token_S[chosen]], rows["gate_up"], rows.get("gate_up_bias"))
        y = F.linear(apply_gate(canonical, up), rows["down"], rows.get("down_bias"))
        out_TH.index_add_(0, token_S[chosen], y.float() * weight_S1[chosen])
    return out_TH.to(dtype)


def _shapes(spec: ExpertsSpec) -> dict[str, tuple[int, ...]]:
    E, H, inter = spec.num_experts, spec.hidden, spec.intermediate
    rows = spec.up_rows
    return {"gate_up": (E, rows, H), "down": (E, H, inter)}


def _aten_weights(spec: ExpertsSpec, packed: Sequence[torch.Tensor], expert: int) -> dict[str, torch.Tensor]:
    """One expert's weights in the plain layout."""
    out, at = {}, 0
    for name, shape in _shapes(spec).items():
        count = len(storage(spec.weights, shape, torch.float32))
        out[name] = dequantize(from_tensors(spec.weights, shape[1:], [t[expert] for t in packed[at : at + count]]))
        at += count
    if spec.has_bias:
        out |= {"gate_up_bias": packed[at][expert], "down_bias": packed[at + 1][expert]}
    return out


def _aten_meta(spec: ExpertsSpec, dtype: torch.dtype) -> list[TensorMeta]:
    metas = [TensorMeta(*m) for shape in _shapes(spec).values() for m in storage(spec.weights, shape, dtype)]
    if spec.has_bias:
        metas += [TensorMeta(shape[:2], dtype) for shape in _shapes(spec).values()]
    return metas


def _aten_pack(spec: ExpertsSpec, tensors: Mapping[str, Any]) -> list[torch.Tensor]:
    host, stored = torch.device("cpu"), stored_parts(spec, tensors)
    if stored:
        kept = [t for name in ("gate_up", "down") for t in stored[name].tensors()]
        kept += [tensors[name] for name in ("gate_up_bias", "down_bias") if spec.has_bias]
        return [t.to(host, copy=True).contiguous() for t in kept]
    plain = plain_layout(spec, tensors)
    out = [t for name in ("gate_up", "down") for t in quantize(plain[name], spec.weights, device=host).tensors()]
    out += [plain[name] for name in ("gate_up_bias", "down_bias") if name in plain]
    return [t.to(host, copy=True).contiguous() for t in out]


def _unsupported(spec: ExpertsSpec, dtype: torch.dtype, device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"it runs on the host, not on {device}"
    if dtype not in _FLOATS:
        return f"it takes float32, bfloat16 or float16 weights, not {dtype}"
    try:
        parse_format(spec.weights)
    except KtfxError as error:
        return error.what
    return None


def _packed_meta(spec: ExpertsSpec, dtype: torch.dtype) -> list[TensorMeta]:
    return experts_native.packed_meta(spec, dtype) if _is_native() else _aten_meta(spec, dtype)


def _pack(spec: ExpertsSpec, tensors: Mapping[str, Any], device: torch.device) -> list[torch.Tensor]:
    if _is_native():
        return experts_native.pack(spec, tensors)
    _warn_once()
    return _aten_pack(spec, tensors)


def _forward(
    spec: ExpertsSpec,
    x_TH: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    packed: Sequence[torch.Tensor],
) -> torch.Tensor:
    run = experts_native.forward if _is_native() else aten_experts
    return run(spec, x_TH, ids_TK, weights_TK, packed)


def _dequantised(spec: ExpertsSpec, packed: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    if _is_native():
        return experts_native.dequantised(spec, packed)
    each = [_aten_weights(spec, packed, e) for e in range(spec.num_experts)]
    return {name: torch.stack([weights[name] for weights in each]) for name in each[0]}


def _restored(spec: ExpertsSpec, packed: Sequence[torch.Tensor], part: str, experts: range) -> torch.Tensor:
    if _is_native():
        return experts_native.restored(spec, packed, part, experts)
    names = ("gate_up", "down", "gate_up_bias", "down_bias")
    plain = packed[names.index(part)][experts.start : experts.stop]
    if spec.alternates and part in ("gate_up", "gate_up_bias"):
        plain = torch.stack(plain.chunk(2, dim=1), dim=2).flatten(1, 2)
    return (plain.transpose(1, 2) if spec.transposed and not part.endswith("_bias") else plain).clone()


CPU_KERNEL = register_experts_kernel(
    ExpertsKernel(
        name="cpu",
        unsupported=_unsupported,
        packed_meta=_packed_meta,
        pack=_pack,
        forward=_forward,
        dequantised=_dequantised,
        restored=_restored,
    )
)
