"""``experts.cpu``: the routed experts on the host, by the native kernels where they are built, else by ATen.

The ATen path keeps the model's own weights in the plain layout and runs one grouped loop over the experts that got a
token. It is correct everywhere and fast nowhere; ``cpu_kernels_status`` says which path this process has.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ktfx.errors import HostCallError, KtfxWarning
from ktfx.ops.experts import ExpertsKernel, ExpertsSpec, TensorMeta, apply_gate, plain_layout, register_experts_kernel

_NAMES = ("gate_up", "down", "gate_up_bias", "down_bias")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class CpuKernelsStatus:
    """What runs ``experts.cpu`` in this process: ``path`` is ``native`` or ``aten``; ``detail`` says why, in words."""

    path: str
    detail: str

    def __str__(self) -> str:
        return f"experts.cpu: {self.path} ({self.detail})"


def cpu_kernels_status() -> CpuKernelsStatus:
    """The line that ``ktfx doctor`` prints about the CPU kernels."""
    return CpuKernelsStatus("aten", "the native library is not built")


_warned: list[str] = []


def _warn_once(status: CpuKernelsStatus) -> None:
    if status.path == "aten" and not _warned:
        _warned.append(status.detail)
        warnings.warn(
            f"experts.cpu runs on ATen, several times slower than its own kernels: {status.detail}",
            KtfxWarning,
            stacklevel=3,
        )


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
    plain: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """Tokens sorted by expert, one pair of matmuls for each expert that got any; sums in float32, returns x's dtype."""
    check_ids(ids_TK, spec.num_experts)
    out_TH = torch.zeros(x_TH.shape, dtype=torch.float32)
    order_S = ids_TK.flatten().argsort(stable=True)
    token_S = order_S // ids_TK.shape[1]
    weight_S1 = weights_TK.flatten()[order_S].float()[:, None]
    counts = torch.bincount(ids_TK.flatten(), minlength=spec.num_experts).tolist()
    canonical, dtype, begin = spec.canonical(), x_TH.dtype, 0
    for e, count in enumerate(counts):
        if not count:
            continue
        chosen = slice(begin, begin + count)
        begin += count
        rows = {name: t[e].to(dtype) for name, t in plain.items()}
        up = F.linear(x_TH[token_S[chosen]], rows["gate_up"], rows.get("gate_up_bias"))
        y = F.linear(apply_gate(canonical, up), rows["down"], rows.get("down_bias"))
        out_TH.index_add_(0, token_S[chosen], y.float() * weight_S1[chosen])
    return out_TH.to(dtype)


def _unsupported(spec: ExpertsSpec, dtype: torch.dtype, device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"it runs on the host, not on {device}"
    if dtype not in _FLOATS:
        return f"it takes float32, bfloat16 or float16 weights, not {dtype}"
    if spec.weights != "model":
        return f"the ATen path keeps the model's own weights, not {spec.weights}"
    return None


def _packed_meta(spec: ExpertsSpec, dtype: torch.dtype) -> list[TensorMeta]:
    E, H, inter = spec.num_experts, spec.hidden, spec.intermediate
    rows = inter if spec.gate == "none" else 2 * inter
    metas = [TensorMeta((E, rows, H), dtype), TensorMeta((E, H, inter), dtype)]
    if spec.has_bias:
        metas += [TensorMeta((E, rows), dtype), TensorMeta((E, H), dtype)]
    return metas


def _pack(spec: ExpertsSpec, tensors: Mapping[str, torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    _warn_once(cpu_kernels_status())
    plain = plain_layout(spec, tensors)
    return [plain[name].to(device, copy=True).contiguous() for name in _NAMES if name in plain]


def _named(packed: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(zip(_NAMES, packed, strict=False))


def _forward(
    spec: ExpertsSpec,
    x_TH: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    packed: Sequence[torch.Tensor],
) -> torch.Tensor:
    return aten_experts(spec, x_TH, ids_TK, weights_TK, _named(packed))


CPU_KERNEL = register_experts_kernel(
    ExpertsKernel(
        name="cpu",
        unsupported=_unsupported,
        packed_meta=_packed_meta,
        pack=_pack,
        forward=_forward,
        dequantised=lambda spec, packed: _named(packed),
    )
)
