"""fuse_swiglu: gated activations, however they are spelt; what is left alone and why."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pass_runs import PassRun, run_passes
from torch import nn

GPU = {"devices": {"gpu0": "cuda:0"}, "default_device": "gpu0", "rules": []}
ACTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "silu ": lambda x: x * torch.sigmoid(x),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class MLP(nn.Module):
    def __init__(self, act: Callable[[torch.Tensor], torch.Tensor], merged: bool = False) -> None:
        super().__init__()
        self.act, self.merged = act, merged
        self.up_proj = nn.Linear(8, 16 + 16 * merged, bias=False)
        self.gate_proj = nn.Linear(8, 16, bias=False)
        self.down_proj = nn.Linear(16, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.merged:
            gate, up = self.up_proj(x).chunk(2, dim=-1)
            return self.down_proj(self.act(gate) * up)
        return self.down_proj(self.up_proj(x) * self.act(self.gate_proj(x)))


class Model(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x)


def run(mlp: nn.Module, dtype: torch.dtype = torch.float32) -> PassRun:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, dtype=dtype)
    done = run_passes(Model(mlp).to(dtype), GPU, x, passes=("resolve_rules", "fuse_swiglu"))
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(done.out, done.expected, atol=tolerance, rtol=tolerance)
    return done


@pytest.mark.parametrize("act", ACTS)
def test_activations(act: str) -> None:
    done = run(MLP(ACTS[act]), torch.bfloat16)
    (call,) = [n for n in done.after.graph.nodes if "gated_mul" in str(n.target)]
    assert call.args[2] == act.strip() and [r.module for r in done.context.rewrites] == ["mlp"]
    assert not done.context.misses


def test_halves_of_one_projection(golden: Callable[[str, str], None]) -> None:
    done = run(MLP(F.silu, merged=True))
    golden("fuse_swiglu_merged.diff", done.diff())


def test_another_activation_is_a_miss() -> None:
    done = run(MLP(torch.tanh))
    assert not done.context.rewrites
    (miss,) = done.context.misses
    assert miss.module == "mlp" and "expects aten.silu, the graph has" in miss.why


def test_a_scalar_gate_is_left_alone() -> None:
    class Scaled(MLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.up_proj(x)[..., :1] * F.silu(self.gate_proj(x)))

    done = run(Scaled(F.silu))
    assert not done.context.rewrites
    assert "gate is torch.float32" in done.context.misses[0].why
