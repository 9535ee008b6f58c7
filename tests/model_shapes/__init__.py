"""The published shapes of the models that rule files ship for: a ``config.json`` each, by hand from public facts.

They ship as ``ktfx/shapes``, so that ``ktfx explain RULES --model deepseek-v3`` needs no download.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import PreTrainedModel

import ktfx

FOLDER = Path(ktfx.__file__).parent / "shapes"


@dataclass(frozen=True)
class Shape:
    """One published model.

    parameters: what its makers say it has. rules: the families of rule files that serve it, its own first.
    """

    name: str
    title: str
    parameters: float
    rules: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return FOLDER / self.name


SHAPES = (
    Shape("deepseek-v2", "DeepSeek-V2", 236e9, ("deepseek-v2",)),
    Shape("deepseek-v2-lite", "DeepSeek-V2-Lite", 15.7e9, ("deepseek-v2-lite",)),
    Shape("deepseek-v3", "DeepSeek-V3", 671e9, ("deepseek-v3",)),
    Shape("kimi-k2", "Kimi-K2", 1.04e12, ("kimi-k2",)),  # its own model_type, kimi_k2, is the DeepSeek-V3 architecture
    Shape("qwen2-57b-a14b", "Qwen2-57B-A14B", 57.4e9, ("qwen2-moe",)),
    Shape("qwen1.5-moe-a2.7b", "Qwen1.5-MoE-A2.7B", 14.3e9, ("qwen2-moe",)),
    Shape("qwen3-235b-a22b", "Qwen3-235B-A22B", 235e9, ("qwen3-moe",)),
    Shape("qwen3-30b-a3b", "Qwen3-30B-A3B", 30.5e9, ("qwen3-30b-a3b", "qwen3-moe")),
    Shape("qwen3-next-80b-a3b", "Qwen3-Next-80B-A3B", 80e9, ("qwen3-next",)),
    Shape("mixtral-8x7b", "Mixtral-8x7B", 46.7e9, ("mixtral",)),
    Shape("mixtral-8x22b", "Mixtral-8x22B", 141e9, ("mixtral",)),
    Shape("olmoe-1b-7b", "OLMoE-1B-7B", 6.9e9, ("olmoe",)),
    Shape("glm-4.5", "GLM-4.5", 355e9, ("glm-4-moe",)),
    Shape("glm-4.5-air", "GLM-4.5-Air", 106e9, ("glm-4-moe",)),
    Shape("gpt-oss-20b", "gpt-oss-20b", 20.9e9, ("gpt-oss",)),
    Shape("gpt-oss-120b", "gpt-oss-120b", 116.8e9, ("gpt-oss",)),
    Shape("llama-4-scout", "Llama-4-Scout", 109e9, ("llama-4",)),  # 109 B count its vision tower, 1.2 B
    Shape("llama-4-maverick", "Llama-4-Maverick", 400e9, ("llama-4",)),
    Shape("phi-3.5-moe", "Phi-3.5-MoE", 41.9e9, ("phi-moe",)),
)


@cache
def meta_model(name: str) -> PreTrainedModel:
    """The model of a shape on the meta device: all modules, no weights. Do not change it, it is shared."""
    config = AutoConfig.from_pretrained(FOLDER / name)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
