"""All fusion passes on one model, from Dynamo to the program, checked pass by pass on real inputs."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import ktfx

PASSES = ["rewrite_experts", "match_patterns", "fuse_norms", "fuse_rope", "fuse_swiglu", "fuse_router", "merge_linears"]
RULES = {
    "ktfx": 1,
    "devices": {"gpu0": "cuda:0", "gpu1": "cuda:1", "host": "cpu"},
    "layers": {"0": "gpu0", "1": "gpu1"},
    "passes": PASSES,
    "rules": [{"match": {"module": "experts"}, "replace": {"op": "experts.aten", "device": "host"}}],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_qwen3_moe(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        vocab_size=64,
        max_position_embeddings=64,
        mlp_only_layers=[1],
    )
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    ids = torch.randint(0, 64, (2, 7))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        ktfx.compile(model, RULES, simulate="cpu", partition_backend="eager", verify=True)
        actual = model(ids, use_cache=False).logits
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error < (2e-2 if dtype == torch.bfloat16 else 1e-5)
    (graph,) = ktfx.state_of(model).graphs
    done = {r.name: len(r.rewrites) for r in graph.records}
    assert [done[p] for p in PASSES[2:]] == [11, 4, 1, 1, 3]
    assert not [m for r in graph.records for m in r.misses]
    # Layer 1's first norm is on another GPU than the sum before it, which stays where it was.
    sums = [w.module for r in graph.records for w in r.rewrites if w.what.startswith("sum + RMS norm")]
    assert sums == [
        "model.layers.0.post_attention_layernorm",
        "model.layers.1.post_attention_layernorm",
    ]
