"""group_ropes: q's and k's norm and rope become one call in decode steps, bit for bit the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import tiny_model
from parity import check_parity
from pass_runs import PassRun, run_passes
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rope

GPU = {"devices": {"gpu0": "cuda:0"}, "default_device": "gpu0", "rules": []}
BEFORE = ("resolve_rules", "fuse_rope", "fuse_norms")


class Attention(nn.Module):
    """q and k as Qwen3 makes them; ``eps``: of the two norms; ``early``: q is used before k is made."""

    def __init__(self, norms: bool = True, eps: tuple[float, float] = (1e-6, 1e-6), early: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.k_proj = nn.Linear(8, 32, bias=False), nn.Linear(8, 16, bias=False)
        self.q_norm = LlamaRMSNorm(8, eps[0]) if norms else nn.Identity()
        self.k_norm = LlamaRMSNorm(8, eps[1]) if norms else nn.Identity()
        self.register_buffer("inv_freq", torch.tensor([1.0, 0.3, 0.1, 0.05]))
        self.early = early

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        batch, length, _ = hidden_states.shape
        angles = torch.arange(length)[None, :, None] * self.inv_freq.float() + 0.5
        angles = torch.cat((angles, angles), -1)
        cos, sin = angles.cos().to(hidden_states.dtype), angles.sin().to(hidden_states.dtype)
        q = self.q_norm(self.q_proj(hidden_states).view(batch, length, -1, 8)).transpose(1, 2)
        k = self.k_norm(self.k_proj(hidden_states).view(batch, length, -1, 8)).transpose(1, 2)
        if self.early:
            q, _ = llama_rope(q, q, cos, sin)
            _, k = llama_rope(k, k * q.sum(), cos, sin)
        else:
            q, k = llama_rope(q, k, cos, sin)
        return q.flatten(1).sum(-1, keepdim=True) * k


class Model(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"self_attn": Attention(**options)})])

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.layers[0]["self_attn"](hidden_states)


def run(rows: int = 1, length: int = 1, dtype: torch.dtype = torch.bfloat16, **options: Any) -> PassRun:
    x = torch.randn(rows, length, 8).to(dtype)
    done = run_passes(Model(**options).to(dtype), GPU, x, passes=(*BEFORE, "group_ropes"))
    torch.testing.assert_close(done.out, done.expected, atol=2e-2 * float(done.expected.abs().max()), rtol=0)
    return done


def grouped(done: PassRun) -> list[str]:
    return [r.what for r in done.records[-1].rewrites]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_and_ropes_of_q_and_k(dtype: torch.dtype, golden: Callable[[str, str], None]) -> None:
    done = run(rows=2, dtype=dtype)
    assert grouped(done) == ["rope of q and k and the norms before it → ktfx.norm_rope"]
    assert done.ops["ktfx.norm_rope.default"] == 1
    assert done.ops["ktfx.rope.default"] == done.ops["ktfx.rms_norm.default"] == 0
    if dtype == torch.bfloat16:
        golden("group_ropes", done.diff())


def test_it_changes_no_bit() -> None:
    x = torch.randn(2, 1, 8).to(torch.bfloat16)
    apart = run_passes(Model().to(torch.bfloat16), GPU, x, passes=BEFORE)
    together = run_passes(Model().to(torch.bfloat16), GPU, x, passes=(*BEFORE, "group_ropes"))
    assert torch.equal(apart.out, together.out)


def test_ropes_without_norms_and_norms_that_differ() -> None:
    assert grouped(run(norms=False)) == ["rope of q and k → ktfx.norm_rope"]
    differing = run(eps=(1e-6, 1e-3))
    assert grouped(differing) == ["rope of q and k → ktfx.norm_rope"]
    assert differing.ops["ktfx.rms_norm.default"] == 2


def test_a_prefill_and_a_q_that_k_needs_are_left_alone() -> None:
    assert grouped(run(length=3)) == []
    early = run(early=True, dtype=torch.float32)
    assert grouped(early) == [] and "before the other" in " ".join(m.why for m in early.records[-1].misses)


@pytest.mark.slow
def test_parity_on_every_step() -> None:
    rules = {"ktfx": 1, "devices": {"gpu0": "cuda:0"}, "default_device": "gpu0", "rules": []}
    state, _ = check_parity(tiny_model("qwen3_moe"), rules, keep_graphs=True)
    ops = {r.name: len(r.rewrites) for r in state.graphs[-1].records}
    assert ops["group_ropes"] > 0
