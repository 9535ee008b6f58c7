"""fuse_attention: one query token's attention over a cache that is not repeated for the query heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import tiny_model
from parity import DEVICES, check_parity, run_steps, static_cache, two_gpus_host
from pass_runs import PassRun, run_passes
from torch import nn

import ktfx

GPU = {"devices": {"gpu0": "cuda:0"}, "default_device": "gpu0", "rules": []}
HOST = {"devices": {"host": "cpu"}, "default_device": "host", "rules": []}


def repeat_kv(x: torch.Tensor, times: int) -> torch.Tensor:
    B, heads, L, D = x.shape
    return x[:, :, None].expand(B, heads, times, L, D).reshape(B, heads * times, L, D)


class Attention(nn.Module):
    """One layer's attention as transformers writes it, over keys and values given whole."""

    def __init__(self, times: int, values_times: int | None = None, **options: Any) -> None:
        super().__init__()
        self.times, self.values_times, self.options = times, times if values_times is None else values_times, options

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        k, v = repeat_kv(k, self.times), repeat_kv(v, self.values_times)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.options)


class Model(nn.Module):
    """Reads ``input_ids`` so that the phase can be told."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, input_ids: torch.Tensor, q: Any, k: Any, v: Any, mask: Any = None) -> torch.Tensor:
        return self.attention(q, k, v, mask) + input_ids.sum()


def run(attention: nn.Module, tokens: int = 1, rules: Any = GPU, mask: str = "keep", kv_heads: int = 2) -> PassRun:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, tokens, 8, generator=generator)
    k, v = (torch.randn(2, kv_heads, 12, 8, generator=generator) for _ in range(2))
    keep = torch.arange(12).view(1, 1, 1, 12) < torch.tensor([12, 5]).view(2, 1, 1, 1)
    masks = {"keep": keep, "add": torch.zeros(keep.shape).masked_fill(~keep, float("-inf")), "none": None}
    given = (torch.ones(2, tokens, dtype=torch.int64), q, k, v, *([masks[mask]] if mask != "none" else []))
    done = run_passes(Model(attention), rules, *given, passes=("resolve_rules", "fuse_attention"))
    torch.testing.assert_close(done.out, done.expected, atol=1e-5, rtol=1e-5)
    return done


@pytest.mark.parametrize("mask", ["keep", "add", "none"])
def test_the_repeated_copies_go(mask: str) -> None:
    done = run(Attention(2), mask=mask)
    (rewrite,) = done.context.rewrites
    assert rewrite.module == "attention"
    assert rewrite.before.count("aten.clone.default") == 2 and rewrite.before[-1].startswith("aten.scaled_dot")
    assert done.ops_before["aten.clone.default"] == 2 and done.ops["aten.clone.default"] == 0
    (call,) = [n for n in done.after.graph.nodes if "attention_decode_masked" in str(n.target)]
    assert [tuple(a.meta["val"].shape) for a in call.args[:3]] == [(2, 4, 1, 8), (2, 2, 12, 8), (2, 2, 12, 8)]


def test_a_scale_of_its_own_and_no_repetition() -> None:
    done = run(Attention(1, scale=0.7), kv_heads=4)
    (call,) = [n for n in done.after.graph.nodes if "attention_decode_masked" in str(n.target)]
    assert call.args[4] == 0.7 and len(done.context.rewrites) == 1


def test_grouped_heads_left_to_sdpa() -> None:
    done = run(Attention(1, enable_gqa=True))
    (call,) = [n for n in done.after.graph.nodes if "attention_decode_masked" in str(n.target)]
    assert tuple(call.args[1].meta["val"].shape) == (2, 2, 12, 8)


@pytest.mark.parametrize(
    ("attention", "why"),
    [
        (Attention(2, is_causal=True), "causal"),
        (Attention(2, dropout_p=0.5), "drops out"),
    ],
)
def test_what_is_left_alone_says_why(attention: Attention, why: str) -> None:
    torch.manual_seed(0)
    model = Model(attention)
    ids, q = torch.ones(1, 1, dtype=torch.int64), torch.randn(1, 4, 1, 8)
    k, v = torch.randn(1, 2, 12, 8), torch.randn(1, 2, 12, 8)
    done = run_passes(model, GPU, ids, q, k, v, passes=("resolve_rules", "fuse_attention"))
    assert not done.context.rewrites
    assert any(why in miss.why for miss in done.context.misses)


def test_prefill_and_the_host_keep_sdpa() -> None:
    assert not run(Attention(2), tokens=3, mask="none").context.rewrites
    assert not run(Attention(2), rules=HOST).context.rewrites


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_parity_in_real_models(family: str) -> None:
    model = tiny_model(family, layers=2)
    state, _ = check_parity(model, {"ktfx": 1, "devices": DEVICES, "default_device": "gpu0", "rules": []}, steps=6)
    decode = state.graphs[-1]
    found = [r for record in decode.records for r in record.rewrites if record.name == "fuse_attention"]
    assert decode.phase == "generate" and len(found) == 2


def test_it_can_be_switched_off() -> None:
    model = tiny_model("qwen3_moe", layers=2)
    rules = {**two_gpus_host(2), "passes": ["rewrite_experts"]}
    ktfx.compile(model, rules, simulate="cpu", partition_backend="eager")
    run_steps(model, torch.tensor([[5, 6]]), 2, static_cache(model, 8))
    assert not [r for record in ktfx.state_of(model).graphs[-1].records if record.name == "fuse_attention" for r in [1]]
