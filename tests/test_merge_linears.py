"""merge_linears: q/k/v and gate/up become one product over one packed weight; the program still computes the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ktfx.passes.merge_linears import MergeLinears
from pass_runs import PassRun, run_passes
from torch import nn

import ktfx

GPU = {"devices": {"gpu0": "cuda:0", "host": "cpu"}, "default_device": "gpu0", "rules": []}


class Attention(nn.Module):
    def __init__(self, bias: tuple[bool, bool, bool] = (False, False, False)) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 16, bias=bias[0])
        self.k_proj = nn.Linear(8, 8, bias=bias[1])
        self.v_proj = nn.Linear(8, 8, bias=bias[2])
        self.o_proj = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, 2, 8).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, 1, 8).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, 1, 8).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, 16))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(8, 16, bias=False)
        self.up_proj = nn.Linear(8, 16, bias=False)
        self.down_proj = nn.Linear(16, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.self_attn, self.mlp = attention, MLP()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(x)
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self, attention: nn.Module | None = None, count: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(attention or Attention()) for _ in range(count))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states


def run(model: nn.Module, rules: dict[str, Any] = GPU, **options: Any) -> PassRun:
    more = {"options": {"merge_linears": MergeLinears.Options(**options)}} if options else {}
    done = run_passes(model, rules, torch.randn(2, 5, 8), passes=("resolve_rules", "merge_linears"), **more)
    torch.testing.assert_close(done.out, done.expected, atol=1e-6, rtol=1e-5)
    return done


def test_attention_and_mlp(golden: Callable[[str, str], None]) -> None:
    done = run(Model())
    assert done.ops["aten.linear.default"] == 4 and done.ops_before["aten.linear.default"] == 7
    assert [(r.module, len(r.before)) for r in done.context.rewrites] == [
        ("layers.0.self_attn", 3),
        ("layers.0.mlp", 2),
    ]
    golden("merge_linears.diff", done.diff())


def test_biases_go_along() -> None:
    done = run(Model(Attention((True, True, True))))
    (weight, bias) = [w.request.parts for n, w in done.context.packed.items() if "self_attn" in n]
    assert [name for _, name in weight] == [f"layers.0.self_attn.{p}_proj.weight" for p in "qkv"]
    assert [name for _, name in bias] == [f"layers.0.self_attn.{p}_proj.bias" for p in "qkv"]


def test_some_with_a_bias_is_a_miss() -> None:
    done = run(Model(Attention((True, False, False))))
    assert [r.module for r in done.context.rewrites] == ["layers.0.mlp"]
    (miss,) = done.context.misses
    assert miss.module == "layers.0.self_attn"
    assert "q_proj, k_proj, v_proj read one input, some with a bias and some without" in miss.why


def test_options() -> None:
    assert [r.module for r in run(Model(), mlp=False).context.rewrites] == ["layers.0.self_attn"]
    assert [r.module for r in run(Model(), attention=False).context.rewrites] == ["layers.0.mlp"]
    assert not run(Model(), {"rules": []}).context.rewrites, "on the host nothing is merged"
    assert len(run(Model(), {"rules": []}, device="any").context.rewrites) == 2


def test_a_projection_on_another_device_stays() -> None:
    rules = {**GPU, "rules": [{"match": {"name": r"up_proj$"}, "replace": {"device": "host"}}]}
    assert [r.module for r in run(Model(), rules).context.rewrites] == ["layers.0.self_attn"]


def test_a_view_that_needs_its_own_rows() -> None:
    class Flat(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = self.q_proj(x).view(-1)
            return (q.view(2, 5, 16) * torch.cat((self.k_proj(x), self.v_proj(x)), -1)) @ self.o_proj.weight.T

    done = run(Model(Flat()))
    assert done.ops_before["aten.view.default"] == 2 and done.ops["aten.view.default"] == 1
    assert done.ops["aten.reshape.default"] == 1


def compiled(model: nn.Module, **options: Any) -> nn.Module:
    rules = {**GPU, "passes": ["merge_linears", "fuse_swiglu"]}
    return ktfx.compile(model.eval(), {"ktfx": 1, **rules}, simulate="cpu", partition_backend="eager", **options)


@pytest.mark.parametrize("length", [1, 5])
def test_the_program(length: int) -> None:
    model, x = Model(count=2), torch.randn(2, length, 8)
    with torch.no_grad():
        expected = model.eval()(x)
        compiled(model, verify=True)
        torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=1e-5)
    store = ktfx.state_of(model).store
    merged = [e for e in store.entries() if e.format == "merged"]
    assert len(merged) == 4 and all(e.device == "gpu0" for e in merged)
    single = [n for e in store.entries() if e.format == "model" for n in e.names]
    assert not [n for n in single if "q_proj" in n or "gate_proj" in n], "only the merged copy is made"


def test_a_changed_parameter_reaches_the_merged_copy() -> None:
    model, x = Model(), torch.randn(1, 4, 8)
    with torch.no_grad():
        compiled(model)
        model(x)
        model.layers[0].self_attn.k_proj.weight.mul_(2.0)
        ktfx.refresh(model)
        changed = model(x)
        ktfx.restore(model)
        torch.testing.assert_close(changed, model(x), atol=1e-6, rtol=1e-5)
