"""Which shipped rule file serves a model: what ``torch.compile(model, backend="ktfx")`` uses when told nothing else."""

from __future__ import annotations

from ktfx.errors import OptionError

GPU_COUNTS = (8, 4, 2, 1)
"""The numbers of GPUs that every family ships a file for, most first."""

FAMILIES = {
    "deepseek_v2": "deepseek-v2",
    "deepseek_v3": "deepseek-v3",
    "kimi_k2": "kimi-k2",
    "qwen2_moe": "qwen2-moe",
    "qwen3_moe": "qwen3-moe",
    "qwen3_next": "qwen3-next",
    "mixtral": "mixtral",
    "olmoe": "olmoe",
    "glm4_moe": "glm-4-moe",
    "gpt_oss": "gpt-oss",
    "llama4": "llama-4",
    "llama4_text": "llama-4",
    "phimoe": "phi-moe",
}
"""transformers' ``config.model_type`` → the family's files; the family's files serve each of its sizes."""

SIZES = {
    "deepseek_v2": {"deepseek-v2-lite": 15.7e9},
    "deepseek_v3": {"kimi-k2": 1026e9},
    "qwen3_moe": {"qwen3-30b-a3b": 30.5e9},
}
"""Sizes with files of their own, and their parameters: a model within a tenth of one of them gets its files."""


def shipped_rules_for(model_type: str | None, gpus: int, parameters: float | None = None) -> str:
    """The name of the shipped rule file, for ``load_ruleset``.

    model_type: transformers' ``config.model_type``; one without files, or None, gets the ``generic`` ones. gpus: how
    many there are; the file for the next lower number that exists is taken, and ``generic-host`` for none. parameters:
    how many the model has, if known: a size with files of its own then gets those.

    Raises OptionError for a negative number of GPUs.
    """
    if gpus < 0:
        raise OptionError(f"cannot choose rules for {gpus} GPUs", expected="0 or more")
    if gpus == 0:
        return "generic-host"
    kind = model_type or ""
    name = FAMILIES.get(kind, "generic")
    for sized, published in SIZES.get(kind, {}).items():
        if parameters is not None and abs(parameters - published) < published / 10:
            name = sized
    count = next(n for n in GPU_COUNTS if n <= gpus)
    return f"{name}-{count}gpu"
