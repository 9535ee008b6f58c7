"""fuse_swiglu: act(gate)·up → ``ktfx::gated_mul``."""

from __future__ import annotations

from ktfx.canonical import same_shape, tensor_of
from ktfx.fusion import Fusion, FusionPass
from ktfx.matcher import Match
from ktfx.pass_manager import register_pass


def _check(match: Match) -> str | None:
    gate, up, root = (tensor_of(v) for v in (match.captures["gate"], match.captures["up"], match.root))
    if gate is None or up is None or root is None:
        return "gate or up is no tensor"
    if not (same_shape(gate.shape, up.shape) and gate.dtype == up.dtype == root.dtype):
        return f"gate is {gate.dtype} {list(gate.shape)}, up is {up.dtype} {list(up.shape)}"
    return None


def _gated(act: str, call: str) -> Fusion:
    with_ = f"ktfx.gated_mul(gate, up, '{act}')"
    return Fusion(f"{act}(gate)·up → ktfx.gated_mul", f"aten.mul({call}, up)", with_, _check)


@register_pass
class FuseSwiglu(FusionPass):
    """Any gated activation of ``ktfx.ops.activations``. It rounds once, at the end, as a compiler's fusion would."""

    name = "fuse_swiglu"
    numerics_preserving = True
    roles = ("mlp", "shared_experts")
    fusions = (
        _gated("silu", "aten.silu(gate)"),
        _gated("gelu", "aten.gelu(gate)"),
        _gated("gelu_tanh", "aten.gelu(gate, approximate='tanh')"),
        _gated("relu", "aten.relu(gate)"),
    )
