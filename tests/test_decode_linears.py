"""decode_linears: the linear layers of a decode step become ``ktfx::linear_rows``, those of one input in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import tiny_model
from parity import check_parity
from pass_runs import PassRun, run_passes
from test_merge_linears import Attention, Model
from torch import nn

GPU = {"devices": {"gpu0": "cuda:0", "host": "cpu"}, "default_device": "gpu0", "rules": []}


def run(model: nn.Module, rows: int = 1, dtype: torch.dtype = torch.bfloat16, **rules: Any) -> PassRun:
    x = torch.randn(rows, 1, 8, dtype=dtype)
    done = run_passes(model.to(dtype), {**GPU, **rules}, x, passes=("resolve_rules", "decode_linears"))
    torch.testing.assert_close(done.out, done.expected)
    return done


def test_attention_and_mlp(golden: Callable[[str, str], None]) -> None:
    done = run(Model())
    assert done.ops_before["aten.linear.default"] == 7 and done.ops["aten.linear.default"] == 0
    assert done.ops["ktfx.linear_rows.default"] == 4
    assert [(r.module, len(r.before)) for r in done.context.rewrites] == [
        ("layers.0.self_attn", 3),
        ("layers.0.self_attn.o_proj", 1),
        ("layers.0.mlp", 2),
        ("layers.0.mlp.down_proj", 1),
    ]
    golden("decode_linears", done.diff())


class WideGate(nn.Module):
    """A router as DeepSeek's: both sides of the product cast to float32."""

    def __init__(self, bias: bool = False, both: bool = True) -> None:
        super().__init__()
        self.weight, self.both = nn.Parameter(torch.randn(5, 8)), both
        self.bias = nn.Parameter(torch.randn(5)) if bias else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        flat = hidden_states.view(-1, 8)
        weight = self.weight.float() if self.both else self.weight.float() * 1.5
        return nn.functional.linear(flat.float(), weight, None if self.bias is None else self.bias.float())


@pytest.mark.parametrize("bias", [False, True])
def test_a_product_in_float32_of_narrower_weights(bias: bool) -> None:
    done = run(WideGate(bias))
    assert done.ops["ktfx.linear_rows.default"] == 1 and done.ops["aten.linear.default"] == 0
    assert done.ops["aten._to_copy.default"] == 0, "the weights are read as they are"
    (call,) = done.after.graph.find_nodes(op="call_function", target=torch.ops.ktfx.linear_rows.default)
    assert call.args[3] is True and done.out.dtype == torch.float32


def test_a_weight_that_is_more_than_cast_stays() -> None:
    done = run(WideGate(both=False))
    assert not done.context.rewrites and "float32 by torch.float32" in done.context.misses[0].why


def test_layers_with_and_without_a_bias_are_two_calls() -> None:
    done = run(Model(Attention(bias=(True, False, True))))
    assert [len(r.before) for r in done.context.rewrites if r.module.startswith("layers.0.self_attn")] == [2, 1, 1]


def test_at_most_four_weights_a_call() -> None:
    class Six(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(nn.Linear(8, n + 1) for n in range(6))

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return torch.cat([part(hidden_states) for part in self.parts], -1)

    assert [len(r.before) for r in run(Six()).context.rewrites] == [4, 2]


def test_what_it_leaves_alone_and_why() -> None:
    def misses(done: PassRun) -> str:
        assert not done.context.rewrites
        return " ".join(m.why for m in done.context.misses)

    assert "float32 by torch.float32" in misses(run(Model(), dtype=torch.float32))
    assert "3 rows" in misses(run(Model(), rows=3))
    assert misses(run(Model(), default_device="host")) == ""

    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(hidden_states, self.weight * 2)

    assert "computed" in misses(run(Computed()))


def test_prefill_keeps_its_products() -> None:
    x = torch.randn(1, 5, 8, dtype=torch.bfloat16)
    done = run_passes(Model().to(torch.bfloat16), GPU, x, passes=("resolve_rules", "decode_linears"))
    assert done.ops["aten.linear.default"] == 7


@pytest.mark.slow
def test_parity_in_bfloat16() -> None:
    model = tiny_model("qwen3_moe").to(torch.bfloat16)
    rules = {"ktfx": 1, "devices": {"gpu0": "cuda:0"}, "default_device": "gpu0", "rules": []}
    check_parity(model, rules, tolerance=2e-2)
