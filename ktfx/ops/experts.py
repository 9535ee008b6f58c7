"""The experts family: ``ktfx::routed_experts``, its layouts, its kernels' registry, and the reference they are held to.

Shape suffixes: T tokens, H hidden, I intermediate, E experts, K chosen experts, S = T·K chosen (token, expert) pairs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from ktfx.errors import KtfxError, PlacementError, WeightError
from ktfx.formats import QuantizedWeight, format_name, parse_format
from ktfx.ops.define import define_op

Weight = torch.Tensor | QuantizedWeight

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda t: F.relu(t).square(),
    "none": lambda t: t,
}


@dataclass(frozen=True)
class ExpertsSpec:
    """What one routed-experts call computes and how its weights lie; equal specs make equal compiled partitions.

    num_experts, hidden, intermediate: E, H, I.
    activation: a key of ``ACTIVATIONS``.
    gate: ``mul`` is act(gate)·up; ``clamped`` is gpt-oss's (up+1)·gate·sigmoid(alpha·gate) with both clamped at
        ``limit`` (gate from above only); ``none`` has no gate: act(up).
    transposed: weights are (E, in, out), not (E, out, in).
    interleaved: gate and up rows alternate (g0, u0, g1, u1, …), not gate then up.
    has_bias: ``gate_up_bias`` (E, 2I or I) and ``down_bias`` (E, H) exist.
    weights: the storage format, a name of ``ktfx.formats`` (``model`` keeps the model's own dtype).
    activations: what the kernel may turn activations into: ``model`` (leave them) or ``int8`` (per block; CPU).
    """

    num_experts: int
    hidden: int
    intermediate: int
    activation: str = "silu"
    gate: str = "mul"
    alpha: float = 1.702
    limit: float = 7.0
    transposed: bool = False
    interleaved: bool = False
    has_bias: bool = False
    weights: str = "model"
    activations: str = "model"

    @property
    def up_parts(self) -> int:
        """Weight rows that one value of I stands for: of gate and of up, or of up alone."""
        return 1 if self.gate == "none" else 2

    @property
    def up_rows(self) -> int:
        """Rows of gate_up: 2·I, or I without a gate."""
        return self.up_parts * self.intermediate

    @property
    def alternates(self) -> bool:
        """Whether gate_up's rows have to be told apart one by one: interleaved, and there are two kinds."""
        return self.interleaved and self.gate != "none"

    def encode(self) -> str:
        """The spec as one canonical string (a compiled graph holds it as a constant)."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @staticmethod
    @lru_cache(maxsize=4096)
    def decode(text: str) -> ExpertsSpec:
        return ExpertsSpec(**json.loads(text))

    def canonical(self) -> ExpertsSpec:
        """The same computation over weights in the plain layout: (E, out, in), gate rows then up rows."""
        return replace(self, transposed=False, interleaved=False)


@dataclass(frozen=True)
class TensorMeta:
    """Shape and dtype of a packed tensor, known before anything is packed."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class ExpertsKernel:
    """One implementation of the family, registered by name (``experts.<name>`` in a rule file).

    unsupported(spec, dtype, device): None if the kernel takes it, else the reason in words.
    packed_meta(spec, dtype): the packed tensors it will make; ``dtype`` is that of the model's weights.
    pack(spec, tensors, device): the model's tensors (``gate_up``, ``down`` and, with biases, ``gate_up_bias``,
        ``down_bias``; any strides, host or device) to the kernel's own layout on ``device``, as ``packed_meta`` says.
        ``gate_up`` and ``down`` may be quantised already in the spec's format, (E, N, K): their bits are kept.
    forward(spec, x_TH, ids_TK, weights_TK, packed): the call; returns (T, H) in x's dtype.
    dequantised(spec, packed): the weights it really computes with, in the plain layout (tests, error reports).
    restored(spec, packed, part, experts): the model's own tensor of a part for a range of experts, bit for bit and in
        the model's layout, from a pack of the format ``model``; None where the kernel has no such way.
    takes_parameters(spec): whether ``pack`` would change nothing, so that the model's own contiguous tensors can be
        passed in the order of ``packed_meta`` and no second copy is made.
    """

    name: str
    unsupported: Callable[[ExpertsSpec, torch.dtype, torch.device], str | None]
    packed_meta: Callable[[ExpertsSpec, torch.dtype], list[TensorMeta]]
    pack: Callable[[ExpertsSpec, Mapping[str, Any], torch.device], list[torch.Tensor]]
    forward: Callable[[ExpertsSpec, torch.Tensor, torch.Tensor, torch.Tensor, Sequence[torch.Tensor]], torch.Tensor]
    dequantised: Callable[[ExpertsSpec, Sequence[torch.Tensor]], dict[str, torch.Tensor]]
    restored: Callable[[ExpertsSpec, Sequence[torch.Tensor], str, range], torch.Tensor] | None = None
    takes_parameters: Callable[[ExpertsSpec], bool] = lambda spec: False


_KERNELS: dict[str, ExpertsKernel] = {}


def register_experts_kernel(kernel: ExpertsKernel) -> ExpertsKernel:
    """Add an implementation; a second one of the same name is an error."""
    if kernel.name in _KERNELS:
        raise KtfxError(f"an experts kernel named {kernel.name!r} is registered already", mend="give it another name")
    _KERNELS[kernel.name] = kernel
    return kernel


def experts_kernel(name: str) -> ExpertsKernel:
    try:
        return _KERNELS[name]
    except KeyError:
        raise PlacementError(
            f"no experts kernel named {name!r}",
            expected="one of " + ", ".join(sorted(_KERNELS)),
            mend="name one of these, as experts.<name>, or register the kernel before compiling",
        ) from None


def experts_kernel_names() -> list[str]:
    return sorted(_KERNELS)


def plain_layout(spec: ExpertsSpec, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The expert tensors as views or copies in the plain layout: gate_up (E, 2I, H) gate first, down (E, H, I)."""
    gate_up, down = tensors["gate_up"], tensors["down"]
    if spec.transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    plain = {"gate_up": gate_up, "down": down}
    if spec.has_bias:
        plain |= {"gate_up_bias": tensors["gate_up_bias"], "down_bias": tensors["down_bias"]}
    if spec.alternates:
        plain["gate_up"] = torch.cat([gate_up[:, 0::2], gate_up[:, 1::2]], dim=1)
        if spec.has_bias:
            bias = plain["gate_up_bias"]
            plain["gate_up_bias"] = torch.cat([bias[:, 0::2], bias[:, 1::2]], dim=1)
    return plain


def stored_parts(spec: ExpertsSpec, tensors: Mapping[str, Any]) -> dict[str, QuantizedWeight]:
    """``gate_up`` and ``down`` where they are quantised already; empty for plain tensors.

    Raises WeightError for another format or shape than the spec's, and for a layout that is not the plain one.
    """
    rows = spec.up_rows
    E, shapes = spec.num_experts, {"gate_up": (rows, spec.hidden), "down": (spec.hidden, spec.intermediate)}
    found = {part: tensors[part] for part in shapes if isinstance(tensors[part], QuantizedWeight)}
    for part, weight in found.items():
        form, group = parse_format(spec.weights)
        wanted = (form.name, group, (E, *shapes[part]))
        if (weight.format, weight.group, tuple(weight.shape)) != wanted or spec.transposed or spec.interleaved:
            raise WeightError(
                f"{part} is quantised already, as {format_name(parse_format(weight.format)[0], weight.group)} "
                f"{tuple(weight.shape)}",
                expected=f"{spec.weights} {(E, *shapes[part])}, in the plain layout",
                mend="name the checkpoint's own format in the rule, or dequantise the weight first",
            )
    return found


def apply_gate(spec: ExpertsSpec, up_SI2: torch.Tensor) -> torch.Tensor:
    """(S, 2I) in the plain layout, or (S, I) without a gate, to (S, I)."""
    act = ACTIVATIONS[spec.activation]
    if spec.gate == "none":
        return act(up_SI2)
    gate, up = up_SI2.chunk(2, dim=-1)
    if spec.gate == "clamped":
        gate = gate.clamp(max=spec.limit)
        up = up.clamp(min=-spec.limit, max=spec.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * spec.alpha))
    return act(gate) * up


def reference_experts(
    spec: ExpertsSpec,
    x_TH: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    plain: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """The definition, one expert after another over weights in the plain layout; sums in float32, returns x's dtype.

    Raises KtfxError if an id is outside [0, E).
    """
    E = spec.num_experts
    if ids_TK.numel() and (int(ids_TK.min()) < 0 or int(ids_TK.max()) >= E):
        raise KtfxError(f"expert id out of range [0, {E})", expected="ids from the router of the same model")
    out_TH = torch.zeros(x_TH.shape, dtype=torch.float32, device=x_TH.device)
    for e in torch.unique(ids_TK).tolist():
        token, slot = torch.where(ids_TK == e)
        x = x_TH[token]
        up = F.linear(x, plain["gate_up"][e].to(x.dtype), _row(plain, "gate_up_bias", e, x.dtype))
        h = apply_gate(spec.canonical(), up)
        y = F.linear(h, plain["down"][e].to(x.dtype), _row(plain, "down_bias", e, x.dtype))
        out_TH.index_add_(0, token, y.float() * weights_TK[token, slot, None].float())
    return out_TH.to(x_TH.dtype)


def _row(plain: Mapping[str, torch.Tensor], name: str, e: int, dtype: torch.dtype) -> torch.Tensor | None:
    bias = plain.get(name)
    return None if bias is None else bias[e].to(dtype)


def _routed_experts(
    x_TH: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    packed: list[torch.Tensor],
    kernel: str,
    spec: str,
) -> torch.Tensor:
    """Every token through its K chosen experts, weighted and summed: (T, H) → (T, H) in x's dtype.

    ids_TK: int32 or int64 in [0, E). weights_TK: any float dtype. packed: what ``ExpertsKernel.pack`` returned.
    kernel: a registered name. spec: ``ExpertsSpec.encode()``.
    """
    return experts_kernel(kernel).forward(ExpertsSpec.decode(spec), x_TH, ids_TK, weights_TK, packed)


def _routed_experts_fake(
    x_TH: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    packed: list[torch.Tensor],
    kernel: str,
    spec: str,
) -> torch.Tensor:
    return x_TH.new_empty(x_TH.shape)


routed_experts = define_op("ktfx::routed_experts", _routed_experts, _routed_experts_fake)


def _reference_tensors(spec: ExpertsSpec, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    plain = plain_layout(spec, tensors)
    return [plain[name] for name in ("gate_up", "down", "gate_up_bias", "down_bias") if name in plain]


def _reference_meta(spec: ExpertsSpec, dtype: torch.dtype) -> list[TensorMeta]:
    E, H, inter = spec.num_experts, spec.hidden, spec.intermediate
    rows = spec.up_rows
    metas = [TensorMeta((E, rows, H), dtype), TensorMeta((E, H, inter), dtype)]
    if spec.has_bias:
        metas += [TensorMeta((E, rows), dtype), TensorMeta((E, H), dtype)]
    return metas


def _reference_names(spec: ExpertsSpec, packed: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(zip(("gate_up", "down", "gate_up_bias", "down_bias"), packed, strict=False))


REFERENCE_KERNEL = register_experts_kernel(
    ExpertsKernel(
        name="reference",
        unsupported=lambda spec, dtype, device: (
            None if spec.weights == "model" else f"it keeps the model's own weights, not {spec.weights}"
        ),
        packed_meta=_reference_meta,
        pack=lambda spec, tensors, device: [
            t.to(device, copy=True).contiguous() for t in _reference_tensors(spec, tensors)
        ],
        forward=lambda spec, x, ids, w, packed: reference_experts(spec, x, ids, w, _reference_names(spec, packed)),
        dequantised=lambda spec, packed: _reference_names(spec, packed),
    )
)
