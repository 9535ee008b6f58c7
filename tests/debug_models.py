"""One tiny MoE model, compiled once with its record kept, for the tests of the debugging tools."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from ktfx.debug.session import Session, Setup, run

RULES = """\
ktfx: 1
devices: {gpu0: cuda:0, gpu1: cuda:1, host: cpu}
default_device: gpu0
layers: {0-0: gpu0, 1-1: gpu1}
rules:
  - match: {module: experts}
    replace: {op: experts.reference, device: host}
  - match: {name: '^model\\.layers\\.0\\.mlp$'}
    replace: {device: gpu1}
"""


def tiny_model(layers: int = 2, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        vocab_size=128,
        max_position_embeddings=256,
    )
    return AutoModelForCausalLM.from_config(config).eval()


@functools.cache
def rules_file() -> Path:
    import tempfile

    path = Path(tempfile.mkdtemp(prefix="ktfx-test-")) / "two.yaml"
    path.write_text(RULES, encoding="utf-8")
    return path


@functools.cache
def tiny_session() -> Session:
    """Prefill and generate of the tiny model over two virtual GPUs, experts on the host, steps timed."""
    setup = Setup(rules=str(rules_file()), simulate="cpu", phase="both", tokens=5, timeline=True)
    return run(setup, tiny_model())
