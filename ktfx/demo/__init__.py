"""The model that ships with ktfx: a byte-level Mixture-of-Experts language model of a few MB, and how it was made."""

from __future__ import annotations

from pathlib import Path


def demo_model_path() -> Path:
    """The Hugging Face directory of the demo model: config, tokenizer and safetensors; no network is needed."""
    return Path(__file__).parent / "model"
