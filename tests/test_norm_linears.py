"""norm_linears: a decode step's norm is worked out by the linear layers that read it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from families import tiny_model
from parity import BFLOAT16_TOLERANCE, check_parity
from pass_runs import PassRun, run_passes
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

GPU = {"devices": {"gpu0": "cuda:0", "host": "cpu"}, "default_device": "gpu0", "rules": []}
PASSES = ("resolve_rules", "fuse_norms", "decode_linears", "norm_linears")


class Block(nn.Module):
    """x + residual, a norm, two layers that read it as rows, and the norm itself. early: another reader comes first."""

    def __init__(self, early: bool = False, wide: int = 6, sums: bool = True, size: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.input_layernorm = LlamaRMSNorm(size)
        self.gate, self.up = nn.Linear(size, wide, bias=False), nn.Linear(size, size, bias=False)
        self.early, self.sums, self.size = early, sums, size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = x + x.tanh() if self.sums else x
        normed = self.input_layernorm(total)
        before = normed.exp() if self.early else 0.0
        rows = normed.view(-1, self.size)
        logits = self.gate(rows)
        return (self.up(rows) + rows + before).view_as(total) + total + logits.sum()


class Model(nn.Module):
    def __init__(self, **options: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"mlp": Block(**options)})])

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.layers[0]["mlp"](hidden_states)


def run(rows: int = 1, **options: int) -> PassRun:
    x = torch.randn(rows, 1, options.get("size", 8), generator=torch.Generator().manual_seed(1)).bfloat16()
    done = run_passes(Model(**options).bfloat16(), GPU, x, passes=PASSES)
    torch.testing.assert_close(done.out, done.expected, atol=3e-2 * float(done.expected.abs().max()), rtol=0)
    return done


def whats(done: PassRun) -> list[str]:
    return [r.what for r in done.records[-1].rewrites]


@pytest.mark.parametrize("sums", [True, False])
def test_norm_and_linears(sums: bool, golden: Callable[[str, str], None]) -> None:
    done = run(rows=2, sums=sums)
    assert whats(done) == ["RMS norm and the linear layers that read it → ktfx.norm_linear_rows"]
    assert done.ops["ktfx.norm_linear_rows.default"] == 1
    gone = ("ktfx.add_rms_norm.default", "ktfx.rms_norm.default", "ktfx.linear_rows.default")
    assert all(done.ops[op] == 0 for op in gone)
    if sums:
        golden("norm_linears", done.diff())


def test_it_changes_no_bit_on_the_host() -> None:
    x = torch.randn(1, 1, 8).bfloat16()
    apart = run_passes(Model().bfloat16(), GPU, x, passes=PASSES[:-1])
    together = run_passes(Model().bfloat16(), GPU, x, passes=PASSES)
    assert torch.equal(apart.out, together.out)


@pytest.mark.parametrize(
    "options, why",
    [
        ({"early": True}, "reads it before"),
        ({"wide": 20000}, "outputs, and it is worked out again"),
        ({"size": 4224}, "its rows of 4224 values"),
    ],
)
def test_what_it_leaves_alone_and_why(options: dict[str, int], why: str) -> None:
    done = run(**options)
    assert whats(done) == [] and why in " ".join(m.why for m in done.records[-1].misses)


@pytest.mark.parametrize("family", ["qwen3_moe", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_parity_on_every_step(family: str) -> None:
    rules = {"ktfx": 1, "devices": {"gpu0": "cuda:0"}, "default_device": "gpu0", "rules": []}
    model = tiny_model(family, layers=2).bfloat16()
    state, _ = check_parity(model, rules, steps=4, tolerance=2 * BFLOAT16_TOLERANCE, poison=False, keep_graphs=True)
    done = {r.name: r.rewrites for r in next(g for g in state.graphs if g.phase == "generate").records}
    assert len(done["norm_linears"]) >= 4
