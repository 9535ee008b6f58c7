"""The linear family: ``ktfx::linear_quant``, its kernels' registry, and the kernels ``reference`` and ``triton``.

Shape suffixes: T rows of x, K inputs, N outputs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

from ktfx.errors import KtfxError, PlacementError, WeightError
from ktfx.formats import FORMATS, QuantizedWeight, dequantize, from_tensors, parse_format, quantize, storage
from ktfx.ops.define import define_op
from ktfx.ops.experts import TensorMeta
from ktfx.ops.triton_loader import kernels, runs_kernels

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
Weight = torch.Tensor | QuantizedWeight


@dataclass(frozen=True)
class LinearSpec:
    """One linear layer: weight (out_features, in_features) kept in the format ``weights`` (``ktfx.formats``).

    activations: what the kernel may turn x into: ``model`` (leave it) or ``int8`` (per block; 4 bits on the host).
    Equal specs over equal kernels make equal compiled partitions.
    """

    in_features: int
    out_features: int
    weights: str = "model"
    activations: str = "model"

    def encode(self) -> str:
        """The spec as one canonical string (a compiled graph holds it as a constant)."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @staticmethod
    @lru_cache(maxsize=4096)
    def decode(text: str) -> LinearSpec:
        return LinearSpec(**json.loads(text))


@dataclass(frozen=True)
class LinearKernel:
    """One implementation of the family, registered by name (``linear.<name>`` in a rule file).

    unsupported(spec, dtype, device): None if the kernel takes it, else the reason in words.
    packed_meta(spec, dtype): the packed tensors it will make; ``dtype`` is that of the model's weight.
    pack(spec, weight, device): the model's weight, or one that is quantised already in the spec's format (its bits are
        kept), to the kernel's own layout on ``device``.
    forward(spec, x, packed, bias): (…, K) to (…, N) in x's dtype.
    dequantised(spec, packed): the weight it really computes with, (N, K).
    """

    name: str
    unsupported: Callable[[LinearSpec, torch.dtype, torch.device], str | None]
    packed_meta: Callable[[LinearSpec, torch.dtype], list[TensorMeta]]
    pack: Callable[[LinearSpec, Weight, torch.device], list[torch.Tensor]]
    forward: Callable[[LinearSpec, torch.Tensor, Sequence[torch.Tensor], torch.Tensor | None], torch.Tensor]
    dequantised: Callable[[LinearSpec, Sequence[torch.Tensor]], torch.Tensor]


_KERNELS: dict[str, LinearKernel] = {}


def register_linear_kernel(kernel: LinearKernel) -> LinearKernel:
    """Add an implementation; a second one of the same name is an error."""
    if kernel.name in _KERNELS:
        raise KtfxError(f"a linear kernel named {kernel.name!r} is registered already", mend="give it another name")
    _KERNELS[kernel.name] = kernel
    return kernel


def linear_kernel(name: str) -> LinearKernel:
    try:
        return _KERNELS[name]
    except KeyError:
        raise PlacementError(
            f"no linear kernel named {name!r}",
            expected="one of " + ", ".join(sorted(_KERNELS)),
            mend="name one of these, as linear.<name>, or register the kernel before compiling",
        ) from None


def linear_kernel_names() -> list[str]:
    return sorted(_KERNELS)


def _linear_quant(
    x: torch.Tensor, packed: list[torch.Tensor], bias: torch.Tensor | None, kernel: str, spec: str
) -> torch.Tensor:
    """(…, K) → (…, N) in x's dtype over what ``LinearKernel.pack`` returned; spec: ``LinearSpec.encode()``."""
    decoded = LinearSpec.decode(spec)
    if x.shape[-1] != decoded.in_features:
        raise KtfxError(
            f"linear_quant got inputs of {x.shape[-1]} features",
            expected=str(decoded.in_features),
            mend="pass the input of the layer that the weight came from",
        )
    return linear_kernel(kernel).forward(decoded, x, packed, bias)


def _linear_quant_fake(
    x: torch.Tensor, packed: list[torch.Tensor], bias: torch.Tensor | None, kernel: str, spec: str
) -> torch.Tensor:
    return x.new_empty([*x.shape[:-1], LinearSpec.decode(spec).out_features])


linear_quant = define_op("ktfx::linear_quant", _linear_quant, _linear_quant_fake)


def _unsupported(spec: LinearSpec, dtype: torch.dtype, device: torch.device) -> str | None:
    try:
        parse_format(spec.weights)
    except WeightError as error:
        return f"{error.what} ({', '.join(FORMATS)})"
    if dtype not in FLOATS:
        return f"its weight would be {dtype}; it takes float32, bfloat16 and float16"
    if spec.activations != "model":
        return f"it leaves activations in the model's dtype, not {spec.activations}"
    if device.type not in ("cuda", "cpu", "meta"):
        return f"it runs on cuda (and, by reference, on cpu), not on {device.type}"
    return None


def weight_shape(spec: LinearSpec) -> tuple[int, int]:
    """(N, K)."""
    return spec.out_features, spec.in_features


def check_weight(spec: LinearSpec, weight: Weight) -> None:
    """WeightError if ``weight`` is not (N, K), or is quantised in another format than the spec's."""
    if tuple(weight.shape) != weight_shape(spec):
        raise WeightError(
            f"a linear weight has shape {tuple(weight.shape)}",
            expected=f"(out, in) = {weight_shape(spec)}",
            mend="check in_features and out_features, and whether the layer keeps its weight transposed",
        )
    if isinstance(weight, QuantizedWeight):
        form, group = parse_format(spec.weights)
        if (weight.format, weight.group) != (form.name, group):
            raise WeightError(
                f"the weight is quantised already, as {weight.format} with groups of {weight.group}",
                expected=f"{form.name} with groups of {group}",
                mend="name the checkpoint's own format in the rule, or dequantise the weight first",
            )


def _pack(spec: LinearSpec, weight: Weight, device: torch.device) -> list[torch.Tensor]:
    check_weight(spec, weight)
    if isinstance(weight, QuantizedWeight):
        return [t.to(device, copy=True).contiguous() for t in weight.tensors()]
    if spec.weights == "model":
        return [weight.to(device, copy=True).contiguous()]
    return quantize(weight, spec.weights, search=True, device=device).tensors()


def _dequantised(spec: LinearSpec, packed: Sequence[torch.Tensor]) -> torch.Tensor:
    if spec.weights == "model":
        return packed[0]
    return dequantize(from_tensors(spec.weights, weight_shape(spec), list(packed)))


def _reference(
    spec: LinearSpec, x: torch.Tensor, packed: Sequence[torch.Tensor], bias: torch.Tensor | None
) -> torch.Tensor:
    y = F.linear(x, _dequantised(spec, packed).to(x.dtype), None if bias is None else bias.to(x.dtype))
    return y.contiguous()  # as the op's fake says, whatever the strides of x


def _triton(
    spec: LinearSpec, x: torch.Tensor, packed: Sequence[torch.Tensor], bias: torch.Tensor | None
) -> torch.Tensor:
    if runs_kernels(x):
        return kernels("linear").linear(x, packed, bias, spec.weights, spec.out_features)
    return _reference(spec, x, packed, bias)


def _meta(spec: LinearSpec, dtype: torch.dtype) -> list[TensorMeta]:
    return [TensorMeta(*meta) for meta in storage(spec.weights, weight_shape(spec), dtype)]


for _name, _forward in (("reference", _reference), ("triton", _triton)):
    register_linear_kernel(LinearKernel(_name, _unsupported, _meta, _pack, _forward, _dequantised))
