"""The experts kernel ``triton``: Triton on CUDA tensors, the reference over the same dequantised weights elsewhere.

A rule file that names it therefore also runs on virtual devices (CPU tensors), with the numbers of the format it names.
Packed: gate_up's tensors as ``QuantizedWeight.tensors`` gives them, then down's, then gate_up_bias and down_bias.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ktfx.errors import WeightError
from ktfx.formats import FORMATS, dequantize, from_tensors, parse_format, quantize, storage
from ktfx.ops.experts import (
    ACTIVATIONS,
    ExpertsKernel,
    ExpertsSpec,
    TensorMeta,
    plain_layout,
    reference_experts,
    register_experts_kernel,
    stored_parts,
)
from ktfx.ops.triton_loader import kernels, runs_kernels

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _shapes(spec: ExpertsSpec) -> dict[str, tuple[int, int, int]]:
    return {
        "gate_up": (spec.num_experts, spec.up_rows, spec.hidden),
        "down": (spec.num_experts, spec.hidden, spec.intermediate),
    }


def unsupported(spec: ExpertsSpec, dtype: torch.dtype, device: torch.device) -> str | None:
    try:
        parse_format(spec.weights)
    except WeightError as error:
        return f"{error.what} ({', '.join(FORMATS)})"
    if dtype not in FLOATS:
        return f"its weights would be {dtype}; it takes float32, bfloat16 and float16"
    if spec.gate not in ("mul", "clamped", "none"):
        return f"it has no gate {spec.gate!r}"
    if spec.activation not in ACTIVATIONS:
        return f"it has no activation {spec.activation!r}"
    if spec.activations != "model":
        return f"it leaves activations in the model's dtype, not {spec.activations}"
    if device.type not in ("cuda", "cpu", "meta"):
        return f"it runs on cuda (and, by reference, on cpu), not on {device.type}"
    return None


def packed_meta(spec: ExpertsSpec, dtype: torch.dtype) -> list[TensorMeta]:
    shapes = _shapes(spec)
    metas = [TensorMeta(*meta) for shape in shapes.values() for meta in storage(spec.weights, shape, dtype)]
    if spec.has_bias:
        metas += [TensorMeta(shapes[name][:2], dtype) for name in ("gate_up", "down")]
    return metas


def pack(spec: ExpertsSpec, tensors: Mapping[str, Any], device: torch.device) -> list[torch.Tensor]:
    """Always a copy: the result never shares memory with the model's tensors."""
    shapes = _shapes(spec)
    packed: list[torch.Tensor] = []
    stored = stored_parts(spec, tensors)
    if stored:
        packed = [t.to(device, copy=True).contiguous() for name in shapes for t in stored[name].tensors()]
        biases = [tensors[f"{name}_bias"] for name in shapes if spec.has_bias]
        return packed + [bias.to(device, copy=True).contiguous() for bias in biases]
    plain = plain_layout(spec, tensors)
    for name, shape in shapes.items():
        if tuple(plain[name].shape) != shape:
            raise WeightError(
                f"expert weight {name} has shape {tuple(plain[name].shape)}",
                expected=str(shape),
                mend="check num_experts, hidden, intermediate, gate and transposed of the layout",
            )
        if spec.weights == "model":
            packed.append(plain[name].to(device, copy=True).contiguous())
        else:
            packed += quantize(plain[name], spec.weights, search=True, device=device).tensors()
    if spec.has_bias:
        packed += [plain[f"{name}_bias"].to(device, copy=True).contiguous() for name in shapes]
    return packed


def dequantised(spec: ExpertsSpec, packed: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """In the model's dtype where that is stored, else float32."""
    many = (len(packed) - 2 * spec.has_bias) // 2
    plain = {}
    for i, (name, shape) in enumerate(_shapes(spec).items()):
        q = from_tensors(spec.weights, shape, list(packed[i * many : (i + 1) * many]))
        plain[name] = q.data if spec.weights == "model" else dequantize(q)
    if spec.has_bias:
        plain |= dict(zip(("gate_up_bias", "down_bias"), packed[2 * many :], strict=True))
    return plain


def forward(
    spec: ExpertsSpec,
    x_TH: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    packed: Sequence[torch.Tensor],
) -> torch.Tensor:
    if runs_kernels(x_TH):
        return kernels("experts").routed_experts(spec, x_TH, ids_TK, weights_TK, packed)
    # reference_experts casts the weights to x's dtype, which is where the kernels round them too.
    return reference_experts(spec, x_TH, ids_TK, weights_TK, dequantised(spec, packed))


def takes_parameters(spec: ExpertsSpec) -> bool:
    """Of a weight that is stored in the spec's format its own tensors are what ``pack`` would copy."""
    return not spec.transposed and not spec.alternates


TRITON_KERNEL = register_experts_kernel(
    ExpertsKernel("triton", unsupported, packed_meta, pack, forward, dequantised, takes_parameters=takes_parameters)
)
