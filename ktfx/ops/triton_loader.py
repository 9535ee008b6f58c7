"""Triton kernels on demand: ktfx imports without triton, and asking for a kernel without it says how to mend that."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import torch

from ktfx.errors import KtfxError


def kernels(family: str) -> ModuleType:
    """``ktfx.triton_kernels.<family>``. Raises KtfxError if triton cannot be imported."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise KtfxError(
            f"the Triton kernels ({family}) were asked for, but triton cannot be imported: {error}",
            expected="triton 3.6 or later beside torch",
            mend="pip install 'ktfx[triton]', or name an op that needs no Triton (aten, cpu)",
        ) from error
    return importlib.import_module(f"ktfx.triton_kernels.{family}")


def runs_kernels(t: torch.Tensor) -> bool:
    """Whether a call on this tensor goes to the kernels: on CUDA, or on the CPU under TRITON_INTERPRET=1 (tests)."""
    return t.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
