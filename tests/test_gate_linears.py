"""gate_linears: in decode steps, act(gate)·up is written by the layers that make gate and up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pass_runs import PassRun, run_passes
from test_fuse_swiglu import ACTS
from torch import nn

GPU = {"devices": {"gpu0": "cuda:0", "host": "cpu"}, "default_device": "gpu0", "rules": []}
PASSES = ("resolve_rules", "fuse_norms", "decode_linears", "gate_linears", "norm_linears")
Act = Callable[[torch.Tensor], torch.Tensor]


class MLP(nn.Module):
    """up_first: the layers in the other order. peeks: something else reads the gate. wide: more outputs of the gate,
    which are cut off. bias: of gate and up, or of one of them."""

    def __init__(
        self, act: Act = F.silu, up_first: bool = False, peeks: bool = False, wide: int = 0, bias: str = ""
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate_proj = nn.Linear(8, 24 + wide, bias="gate" in bias)
        self.up_proj = nn.Linear(8, 24, bias="up" in bias)
        self.down_proj = nn.Linear(24, 8, bias=False)
        self.act, self.up_first, self.peeks = act, up_first, peeks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.up_first:
            up, gate = self.up_proj(x), self.gate_proj(x)
            return self.down_proj(up * self.act(gate))
        gate, up = self.gate_proj(x)[..., :24], self.up_proj(x)
        y = self.down_proj(self.act(gate) * up)
        return y + gate.sum() if self.peeks else y


class Model(nn.Module):
    def __init__(self, mlp: nn.Module, normed: bool = False) -> None:
        super().__init__()
        norm = nn.RMSNorm(8, eps=1e-6) if normed else nn.Identity()
        self.layers = nn.ModuleList([nn.ModuleDict({"mlp": mlp, "norm": norm})])

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.layers[0]["mlp"](self.layers[0]["norm"](hidden_states))


def run(mlp: nn.Module, rows: int = 1, passes: tuple[str, ...] = PASSES, normed: bool = False) -> PassRun:
    x = torch.randn(rows, 1, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    done = run_passes(Model(mlp, normed).bfloat16(), GPU, x, passes=passes)
    torch.testing.assert_close(done.out, done.expected, atol=2e-2 * float(done.expected.abs().max()), rtol=0)
    return done


def acts(done: PassRun) -> list[str]:
    calls = done.after.graph.find_nodes(op="call_function", target=torch.ops.ktfx.linear_rows.default)
    return [call.args[4] for call in calls if len(call.args) > 4]


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("up_first", [False, True])
def test_activations_in_either_order(act: str, up_first: bool) -> None:
    done = run(MLP(ACTS[act], up_first), rows=2)
    assert acts(done) == [act.strip()] and done.ops["ktfx.linear_rows.default"] == 2
    assert done.ops["aten.mul.Tensor"] == 0 < done.ops_before["aten.mul.Tensor"]
    (call, _) = done.after.graph.find_nodes(op="call_function", target=torch.ops.ktfx.linear_rows.default)
    assert ["gate" in w.name for w in call.args[1]] == [True, False]


def test_one_rewrite_and_its_record(golden: Callable[[str, str], None]) -> None:
    done = run(MLP(bias="gate and up"))
    (rewrite,) = [r for r in done.context.rewrites if "·up" in r.what]
    assert rewrite.what == "silu(gate)·up and their linear layers → ktfx::linear_rows"
    assert rewrite.module == "layers.0.mlp" and "aten.silu.default" in rewrite.before
    assert rewrite.after == ("ktfx.linear_rows.default", "getitem")
    golden("gate_linears", done.diff())


def test_with_the_norm_before() -> None:
    done = run(MLP(), normed=True)
    (call,) = done.after.graph.find_nodes(op="call_function", target=torch.ops.ktfx.norm_linear_rows.default)
    assert call.args[-1] == "silu" and len(call.meta["val"]) == 2


@pytest.mark.parametrize("rows", [1, 2])
def test_it_rounds_as_gated_mul_does(rows: int) -> None:
    swiglu = ("resolve_rules", "fuse_swiglu", "decode_linears")
    assert torch.equal(run(MLP(), rows).out, run(MLP(), rows, swiglu).out)


@pytest.mark.parametrize(
    "options, why",
    [({"peeks": True}, "reads gate or up as well"), ({"bias": "up"}, "gate and up are two calls")],
)
def test_what_it_leaves_alone_and_why(options: dict[str, object], why: str) -> None:
    done = run(MLP(**options))  # type: ignore[arg-type]
    (miss,) = [m for m in done.context.misses if "gate_linears" in m.why]
    assert acts(done) == [] and why in miss.why and miss.module.startswith("layers.0.mlp")


def test_halves_of_another_width_stay() -> None:
    assert acts(run(MLP(wide=3))) == []


def test_more_rows_than_a_decode_step_has() -> None:
    done = run(MLP(), rows=3)
    assert acts(done) == [] and done.ops["aten.silu.default"] == 1
