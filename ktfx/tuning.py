"""Remembered kernel configurations: a shipped table for Hopper GPUs, and one on this machine that a sweep writes.

A key is a line of text that names the kernel, the format, the shapes and a bucket of the token count; a value is the
list of configurations (as plain dicts) that a sweep found fastest. Nothing here ever measures: a key that nobody
measured leaves the kernel's own choice by shape in force, so a first call never tunes.

The machine's table is ``$KTFX_CACHE/tuned.json`` (``~/.cache/ktfx`` without the variable) and goes by the GPU's full
name; it is asked before the shipped ``triton_kernels/tuned_hopper.json``, which serves compute capability 9.0.
"""

from __future__ import annotations

import json
import os
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

Configs = list[dict[str, Any]]
SHIPPED = "tuned_hopper.json"


def bucket(tokens: int) -> int:
    """Token counts that share a configuration: the least power of two that holds them."""
    return 1 << max(tokens - 1, 0).bit_length()


def machine_table() -> Path:
    return Path(os.environ.get("KTFX_CACHE") or Path.home() / ".cache" / "ktfx") / "tuned.json"


def remembered(key: str, device: torch.device) -> Configs | None:
    """The configurations measured for ``key`` on this kind of GPU, or None."""
    if device.type != "cuda":
        return None
    name, capability = _gpu(device)
    found = _read(machine_table()).get(name, {}).get(key)
    if found is None and capability == (9, 0):
        import ktfx.triton_kernels

        found = _read(Path(ktfx.triton_kernels.__path__[0]) / SHIPPED).get("hopper", {}).get(key)
    return found


def remember(gpu: str, found: dict[str, Configs], path: Path | None = None) -> Path:
    """Add a sweep's results under a GPU's name; the file is replaced as a whole, so that no reader sees half of one."""
    path = machine_table() if path is None else path
    path.parent.mkdir(parents=True, exist_ok=True)
    _read.cache_clear()
    table = dict(_read(path))
    table[gpu] = {**table.get(gpu, {}), **found}
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        json.dump(table, file, indent=1, sort_keys=True)
    os.replace(file.name, path)
    _read.cache_clear()
    return path


@lru_cache
def _gpu(device: torch.device) -> tuple[str, tuple[int, int]]:
    return torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)


@lru_cache
def _read(path: Path) -> dict[str, dict[str, Configs]]:
    """The table, empty if there is none or it cannot be read (then the kernels' own choices hold)."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return table if isinstance(table, dict) else {}
