"""Packed expert weights kept on disk: written whole or not at all, and checked before they are used.

A file is safetensors; its header says which spec, weights and version of the layout it holds, and carries a checksum of
every tensor. A file that does not fit is never an error: the caller packs again and writes a new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ktfx.ops.experts import ExpertsSpec, TensorMeta
from ktfx.ops.experts_native import aligned_empty

LAYOUT = 1  # of the packed bytes; raised whenever ktfx_cpu.h's tiles change


def fingerprint(files: Sequence[Path | str], module: str) -> str:
    """Names a module's weights by their files' paths, sizes and times of change (nanoseconds), without reading them."""
    stats = [(str(Path(f).resolve()), os.stat(f).st_size, os.stat(f).st_mtime_ns) for f in sorted(map(str, files))]
    return hashlib.sha256(json.dumps([stats, module]).encode()).hexdigest()


def cache_path(directory: Path | str, spec: ExpertsSpec, weights: str) -> Path:
    """The file of a layer; ``weights`` is its fingerprint."""
    name = hashlib.sha256(f"{LAYOUT} {spec.encode()} {weights}".encode()).hexdigest()[:32]
    return Path(directory) / f"experts-{name}.safetensors"


def save_packed(path: Path, spec: ExpertsSpec, weights: str, packed: Sequence[torch.Tensor]) -> None:
    """Write beside the target, flush to the disk, then rename: a reader sees the old file, the new one, or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {str(i): t.contiguous() for i, t in enumerate(packed)}
    header = {"layout": str(LAYOUT), "spec": spec.encode(), "weights": weights}
    header |= {f"crc{name}": str(_checksum(t)) for name, t in tensors.items()}
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata=header)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_packed(path: Path, spec: ExpertsSpec, weights: str, metas: Sequence[TensorMeta]) -> list[torch.Tensor] | None:
    """The packed tensors, on 64-byte lines, or None where the file is missing, of something else, or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            told = {"layout": str(LAYOUT), "spec": spec.encode(), "weights": weights}
            if any(header.get(k) != v for k, v in told.items()) or len(file.keys()) != len(metas):
                return None
            out = []
            for i, meta in enumerate(metas):
                stored = file.get_tensor(str(i))
                if tuple(stored.shape) != meta.shape or stored.dtype != meta.dtype:
                    return None
                if meta.dtype == torch.uint8:
                    stored = aligned_empty(meta.shape).copy_(stored)
                if header.get(f"crc{i}") != str(_checksum(stored)):
                    return None
                out.append(stored)
            return out
    except (OSError, SafetensorError):
        return None


def cached(
    directory: Path | str,
    spec: ExpertsSpec,
    weights: str,
    metas: Sequence[TensorMeta],
    pack: Callable[[], list[torch.Tensor]],
) -> list[torch.Tensor]:
    """What ``pack`` would return, from the cache where it holds it; packs and stores it otherwise."""
    path = cache_path(directory, spec, weights)
    packed = load_packed(path, spec, weights, metas)
    if packed is None:
        packed = pack()
        save_packed(path, spec, weights, packed)
    return packed


def _checksum(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data) if tensor.numel() else 0
