"""fuse_rope on the rotary embeddings of transformers' own models, and on tables that it must not take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pass_runs import PassRun, run_passes
from torch import nn
from transformers.models.deepseek_v2.modeling_deepseek_v2 import apply_rotary_emb as deepseek_v2_rope
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave
from transformers.models.gpt_oss.modeling_gpt_oss import apply_rotary_pos_emb as gpt_oss_rope
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rope
from transformers.models.llama4.modeling_llama4 import apply_rotary_emb as llama4_rope

GPU = {"devices": {"gpu0": "cuda:0"}, "default_device": "gpu0", "rules": []}


class RotaryEmbedding(nn.Module):
    """cos and sin of (1, S, D/2) angles: ``cat`` of two equal halves, of two unequal ones, or one entry a pair; or both
    as a complex number a pair."""

    def __init__(self, halves: str) -> None:
        super().__init__()
        self.halves = halves
        self.register_buffer("inv_freq", torch.tensor([1.0, 0.3, 0.1, 0.05]))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = torch.arange(x.shape[-2])[None, :, None] * self.inv_freq.float()
        if self.halves == "equal":
            angles = torch.cat((angles, angles), dim=-1)
        elif self.halves == "unequal":
            angles = torch.cat((angles, angles * 2), dim=-1)
        elif self.halves == "complex":
            return (torch.polar(torch.ones_like(angles), angles) * 1.5,) * 2
        return (angles.cos() * 1.5).to(x.dtype), (angles.sin() * 1.5).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, apply: Callable[..., Any], partial: bool = False) -> None:
        super().__init__()
        self.apply_rope, self.partial = apply, partial
        width = 12 if partial else 8
        self.qk = nn.Linear(width, 3 * width, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        heads = self.qk(x).view(batch, length, 3, width).transpose(1, 2)
        q, k = heads[:, :2], heads[:, 2:]
        if self.partial:
            q_turned, k_turned = self.apply_rope(q[..., :8], k[..., :8], cos, sin)
            q, k = torch.cat((q_turned, q[..., 8:]), -1), torch.cat((k_turned, k[..., 8:]), -1)
        else:
            q, k = self.apply_rope(q, k, cos, sin)
        return torch.matmul(q, k.transpose(2, 3))


class Model(nn.Module):
    def __init__(self, apply: Callable[..., Any], halves: str = "equal", partial: bool = False, count: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rotary_emb = RotaryEmbedding(halves)
        self.layers = nn.ModuleList(nn.ModuleDict({"self_attn": Attention(apply, partial)}) for _ in range(count))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        cos, sin = self.rotary_emb(x)
        return [layer["self_attn"](x, cos, sin) for layer in self.layers]


def run(model: Model, dtype: torch.dtype = torch.float32, width: int = 8, **more: Any) -> PassRun:
    x = torch.randn(2, 5, width, dtype=dtype)
    done = run_passes(model.to(dtype), GPU, x, passes=("resolve_rules", "fuse_rope"), **more)
    tolerance = 6e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(done.out, done.expected, atol=tolerance, rtol=tolerance)
    return done


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_half_rotation(dtype: torch.dtype, golden: Callable[[str, str], None]) -> None:
    done = run(Model(llama_rope, count=2), dtype)
    assert done.ops["ktfx.rope.default"] == 4 and done.ops["aten.neg.default"] == 0
    tables = {n.args[1] for n in done.after.graph.nodes if "rope" in str(n.target)}
    assert len(tables) == 1, "the layers share one table"
    assert not done.context.misses
    if dtype == torch.bfloat16:
        golden("fuse_rope.diff", done.diff())


def test_partial_rotation() -> None:
    assert run(Model(llama_rope, partial=True), width=12).ops["ktfx.rope.default"] == 2


def test_rotation_of_halves() -> None:
    done = run(Model(gpt_oss_rope, "pairs"))
    assert done.ops["ktfx.rope.default"] == 2 and done.ops["aten.sub.Tensor"] == 0


def test_rotation_of_interleaved_pairs() -> None:
    done = run(Model(apply_rotary_pos_emb_interleave))
    assert done.ops["ktfx.rope.default"] == 2
    assert {n.args[3] for n in done.after.graph.nodes if "rope" in str(n.target)} == {"split"}


def heads_first(q: torch.Tensor, k: torch.Tensor, freqs: torch.Tensor, _: torch.Tensor) -> Any:
    return deepseek_v2_rope(q, k, freqs)


def heads_last(q: torch.Tensor, k: torch.Tensor, freqs: torch.Tensor, _: torch.Tensor) -> Any:
    q, k = llama4_rope(q.transpose(1, 2), k.transpose(1, 2), freqs)
    return q.transpose(1, 2), k.transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("apply", [heads_first, heads_last])
def test_rotation_of_complex_numbers(apply: Callable[..., Any], dtype: torch.dtype) -> None:
    done = run(Model(apply, "complex", count=2), dtype, dynamic_dims=(1,))
    assert done.ops["ktfx.rope.default"] == 4 and done.ops["aten.view_as_complex.default"] == 0
    assert done.ops["aten.view_as_real.default"] == 1, "the layers share one table"
    assert {n.args[3] for n in done.after.graph.nodes if "rope" in str(n.target)} == {"interleaved"}
    assert not done.context.misses


def test_complex_numbers_of_another_layout_are_refused() -> None:
    """One row of the table for all tokens."""

    def other(q: torch.Tensor, k: torch.Tensor, freqs: torch.Tensor, _: torch.Tensor) -> Any:
        q = q.transpose(1, 2)
        return deepseek_v2_rope(q, q, freqs[:, :1])[0].transpose(1, 2), k

    done = run(Model(other, "complex"))
    assert not done.context.rewrites and "the table is [1, 1, 4]" in done.context.misses[0].why


def test_strides_reach_what_reads_them() -> None:
    """The op's result lies head by head; what attention makes of it can no longer be viewed token by token."""

    class Attended(Attention):
        def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
            batch, length, _ = x.shape
            q, k = (self.qk(x)[..., :16].view(batch, length, 2, 8).transpose(1, 2) for _ in range(2))
            q, k = self.apply_rope(q, k, cos, sin)
            out = torch.nn.functional.scaled_dot_product_attention(q, k, k)
            return out.transpose(1, 2).view(batch, length, 16)

    model = Model(llama_rope)
    model.layers[0]["self_attn"] = Attended(llama_rope)
    done = run(model)
    assert done.ops["ktfx.rope.default"] == 2
    assert all(
        n.meta["val"].is_contiguous() for n in done.after.graph.nodes if n.op == "call_function" and "rope" in n.name
    )


def test_symbolic_length() -> None:
    assert run(Model(llama_rope), dynamic_dims=(1,)).ops["ktfx.rope.default"] == 2


def test_a_table_with_unequal_halves_is_refused() -> None:
    done = run(Model(llama_rope, "unequal"))
    assert not done.context.rewrites
    assert "cos is not known to hold the same values in both halves" in done.context.misses[0].why


def test_a_table_for_every_head_is_refused() -> None:
    """cos (B, H, S, D) is what another layout of the heads needs."""

    def other(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        q, k = llama_rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin, unsqueeze_dim=2)
        return q.transpose(1, 2), k.transpose(1, 2)

    done = run(Model(other))
    assert not done.context.rewrites
    assert "expects 1, the graph has 2" in done.context.misses[0].why
