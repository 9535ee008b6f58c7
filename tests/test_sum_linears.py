"""sum_linears: a decode step's shared experts write the sum with the routed ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import tiny_model
from parity import BFLOAT16_TOLERANCE, DEVICES, check_parity
from pass_runs import PassRun, run_passes
from torch import nn

from ktfx.graph import info, op_name

GPU: dict[str, Any] = {"devices": {"gpu0": "cuda:0", "host": "cpu"}, "default_device": "gpu0", "rules": []}
PASSES = ("resolve_rules", "decode_linears", "sum_linears")


class Block(nn.Module):
    """Something with another thing's projection added. gated: times a sigmoid of one number a row. swapped: the other
    order of the sum. peeks: something else reads the projection. times: what the sum takes of it. wide: of the addend's
    leading dimensions one is repeated."""

    def __init__(
        self,
        gated: bool = False,
        swapped: bool = False,
        peeks: bool = False,
        times: float = 1.0,
        wide: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.Tanh()
        self.down_proj = nn.Linear(8, 8, bias=bias)
        self.shared_gate = nn.Linear(8, 1, bias=False)
        self.gated, self.swapped, self.peeks, self.times, self.wide = gated, swapped, peeks, times, wide

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.view(-1, 8)
        shared = self.down_proj(rows.relu())
        routed = self.experts(x)
        if self.wide:
            routed = routed.expand(3, -1, -1)
        out = torch.sigmoid(self.shared_gate(rows)) * shared if self.gated else shared
        out = out.view_as(x)
        total = torch.add(out, routed) if self.swapped else torch.add(routed, out, alpha=self.times)
        return total + shared.sum() if self.peeks else total


class Model(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"mlp": Block(**options)})])

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.layers[0]["mlp"](hidden_states)


def run(rows: int = 1, rules: dict[str, Any] = GPU, **options: Any) -> PassRun:
    x = torch.randn(rows, 1, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    done = run_passes(Model(**options).bfloat16(), rules, x, passes=PASSES)
    torch.testing.assert_close(done.out, done.expected, atol=2e-2 * float(done.expected.abs().max()), rtol=0)
    return done


def sums(done: PassRun) -> list[str]:
    return [r.module for r in done.records[-1].rewrites]


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
def test_layer_and_sum(rows: int, gated: bool, swapped: bool) -> None:
    done = run(rows, gated=gated, swapped=swapped, bias=swapped)
    assert sums(done) == ["layers.0.mlp.down_proj"]
    assert done.ops["ktfx.linear_rows_add.default"] == 1 and done.ops["aten.add.Tensor"] == 0
    assert done.ops["aten.sigmoid.default"] == 0 == done.ops["aten.mul.Tensor"]
    assert done.ops["ktfx.linear_rows.default"] == gated
    if not gated:
        assert torch.equal(done.out, done.expected), "it rounds where the model does"


def test_the_record(golden: Callable[[str, str], None]) -> None:
    done = run(2, gated=True)
    (rewrite,) = done.records[-1].rewrites
    assert rewrite.what == "linear layer and the sum that it goes into → ktfx::linear_rows_add"
    assert {"ktfx.linear_rows.default", "aten.mul.Tensor", "aten.add.Tensor"} <= set(rewrite.before)
    assert rewrite.after == ("ktfx.linear_rows_add.default",)
    golden("sum_linears", done.diff())


@pytest.mark.parametrize("options", [{"peeks": True}, {"times": 2.0}, {"wide": True}, {"rows": 3}])
def test_what_it_leaves_alone(options: dict[str, Any]) -> None:
    done = run(**options)
    assert sums(done) == [] and done.ops["ktfx.linear_rows_add.default"] == 0


def test_a_product_does_not_wait_for_another_device() -> None:
    rules = {**GPU, "rules": [{"match": {"name": "experts"}, "replace": {"device": "host"}}]}
    done = run(rules=rules)
    (miss,) = done.records[-1].misses
    assert sums(done) == [] and miss.module == "layers.0.mlp.down_proj"
    assert "runs on host, it on gpu0 meanwhile" in miss.why


@pytest.mark.parametrize(
    "family",
    ["qwen2_moe", *(pytest.param(f, marks=pytest.mark.slow) for f in ("deepseek_v2", "deepseek_v3", "glm4_moe"))],
)
def test_nothing_is_left_between_the_kernels_of_a_layer_with_shared_experts(family: str) -> None:
    rules = {
        "ktfx": 1,
        "devices": DEVICES,
        "default_device": "gpu0",
        "rules": [{"match": {"module": "experts"}, "replace": {"op": "experts.triton"}}],
    }
    options = {"topk_method": "greedy"} if family == "deepseek_v2" else {}
    model = tiny_model(family, layers=2, **options).bfloat16()
    state, _ = check_parity(model, rules, steps=2, tolerance=2 * BFLOAT16_TOLERANCE, poison=False, keep_graphs=True)
    graph = next(g for g in state.graphs if g.phase == "generate")
    done = {r.name: r for r in graph.records}
    shared = 2 if family == "qwen2_moe" else 1  # the others' first layer is dense
    assert len(done["gate_linears"].rewrites) == 2 and len(done["sum_linears"].rewrites) == shared
    after = done["norm_linears"].graph_after
    assert after is not None
    ops = {op_name(n) for n in after.graph.nodes if n.op == "call_function" and ".layers.1.mlp" in info(n).module}
    assert {op for op in ops if not op.startswith("ktfx.")} == {"aten.view.default", "getitem"}
