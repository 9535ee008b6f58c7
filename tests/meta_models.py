"""Models on the meta device in the shapes that rule files are tested against: no weight is ever allocated."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
)


def on_meta(config: PretrainedConfig) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@cache
def deepseek_v2_lite() -> nn.Module:
    """DeepSeek-V2-Lite's tree: 27 layers, the first dense, no low-rank q."""
    config = DeepseekV2Config(
        num_hidden_layers=27, first_k_dense_replace=1, q_lora_rank=None, n_routed_experts=64, n_shared_experts=2
    )
    return on_meta(config)


@cache
def deepseek_v2_small() -> nn.Module:
    """DeepSeek-V2's tree with its 60 layers, narrow."""
    config = DeepseekV2Config(
        num_hidden_layers=60,
        first_k_dense_replace=1,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        n_routed_experts=8,
        n_shared_experts=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=32,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        vocab_size=256,
    )
    return on_meta(config)


@cache
def deepseek_v3() -> nn.Module:
    """DeepSeek-V3's own shape: 61 layers, 256 experts of 7168 × 2048."""
    return on_meta(DeepseekV3Config())


@cache
def mixtral() -> nn.Module:
    return on_meta(MixtralConfig(num_hidden_layers=32))


@cache
def qwen2_57b() -> nn.Module:
    return on_meta(Qwen2MoeConfig(num_hidden_layers=28))


@cache
def qwen2_small(layers: int = 12) -> nn.Module:
    config = Qwen2MoeConfig(
        num_hidden_layers=layers,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        num_experts=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=256,
    )
    return on_meta(config)


@cache
def gpt_oss_small() -> nn.Module:
    """gpt-oss's layout: transposed, interleaved, biased, with a gate of its own."""
    config = GptOssConfig(
        num_hidden_layers=2,
        hidden_size=64,
        intermediate_size=64,
        num_local_experts=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=256,
    )
    return on_meta(config)


class Expert(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim), nn.Linear(dim, 2 * dim)


class SparseBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, 4)
        self.experts = nn.ModuleList(Expert(dim) for _ in range(4))


class StackedExperts(nn.Module):
    """gpt-fast's conditional feed-forward: three stacked weights and no decorator."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(4, 2 * dim, dim))
        self.w2 = nn.Parameter(torch.empty(4, dim, 2 * dim))
        self.w3 = nn.Parameter(torch.empty(4, 2 * dim, dim))


class StackedBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, 4)
        self.cond_ffn = StackedExperts(dim)


class SelfAttention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.wqkv, self.wo = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)


class Block(nn.Module):
    def __init__(self, dim: int, stacked: bool) -> None:
        super().__init__()
        self.attention = SelfAttention(dim)
        self.feed_forward = StackedBlock(dim) if stacked else SparseBlock(dim)
        self.norm = nn.RMSNorm(dim)


class HandWritten(nn.Module):
    """A plain PyTorch transformer, with no base class and no names of transformers'."""

    def __init__(self, stacked: bool = True, layers: int = 3, dim: int = 16) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(32, dim)
        self.layers = nn.ModuleList(Block(dim, stacked) for _ in range(layers))
        self.norm = nn.RMSNorm(dim)
        self.output = nn.Linear(dim, 32)
