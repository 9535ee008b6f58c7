"""Packed expert weights kept on disk: written whole or not at all, and checked before they are used.

A file is safetensors; its name is a hash of all that decides its bytes (the weights' own numbers, the spec, the
kernel's layout), its header says the same in words and carries a checksum of every tensor. A file
that does not fit is never an error: the weights are packed again and the file is written anew, with a warning.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ktfx.cpu_kernels import library
from ktfx.errors import KtfxWarning
from ktfx.ops import experts_native
from ktfx.ops.experts import TensorMeta, experts_kernel
from ktfx.weight_requests import PackedRequest, WeightRequest

LAYOUT = 1  # of the packed bytes; raised whenever ktfx_cpu.h's tiles change


@dataclass
class PackCache:
    """A directory of packed layers.

    read, written, damaged: files found good, files written, files that were there and could not be used.
    """

    directory: Path
    read: int = 0
    written: int = 0
    damaged: list[str] = field(default_factory=list)

    def packed(
        self, request: WeightRequest, tensors: Mapping[str, torch.Tensor], device: torch.device
    ) -> list[torch.Tensor]:
        """What ``request.pack`` would return, from the directory where it holds that."""
        if not isinstance(request, PackedRequest) or request.kernel != "cpu" or device.type != "cpu":
            return request.pack(tensors, device)
        metas = experts_kernel(request.kernel).packed_meta(request.spec, request.dtype_of(tensors))
        told = header_of(request, tensors)
        path = cache_path(self.directory, told)
        found = load_packed(path, request, told, metas)
        if isinstance(found, list):
            self.read += 1
            return found
        if found is not None:
            self.damaged.append(str(path))
            warnings.warn(f"{path} cannot be used ({found}): the weights are packed again", KtfxWarning, stacklevel=2)
        packed = request.pack(tensors, device)
        try:
            save_packed(path, told, packed)
            self.written += 1
        except OSError as error:
            warnings.warn(f"{path} cannot be written ({error}): the weights stay uncached", KtfxWarning, stacklevel=2)
        return packed

    def report(self) -> dict[str, object]:
        """For ``--json``: directory, and the counts."""
        return {
            "directory": str(self.directory),
            "read": self.read,
            "written": self.written,
            "damaged": list(self.damaged),
        }


def header_of(request: PackedRequest, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """All that decides a pack's bytes. The native layout is one for every instruction set; ATen's is another."""
    return {
        "layout": f"{'native' if library.load().library is not None else 'aten'}-{LAYOUT}",
        "kernel": request.kernel,
        "spec": request.spec.encode(),
        "weights": fingerprint(tensors),
    }


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """A hash of the tensors' own numbers, shapes and dtypes; strides do not matter. One expert is copied at most."""
    parts = []
    for name in sorted(tensors):
        tensor = tensors[name]
        pieces = tensor.unbind(0) if tensor.dim() > 2 else [tensor]
        parts.append((name, str(tensor.dtype), tuple(tensor.shape), [_checksum(p.cpu().contiguous()) for p in pieces]))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def cache_path(directory: Path | str, told: Mapping[str, str]) -> Path:
    """The file of a layer with this header."""
    name = hashlib.sha256(json.dumps(dict(told), sort_keys=True).encode()).hexdigest()[:32]
    return Path(directory) / f"experts-{name}.safetensors"


def save_packed(path: Path, told: Mapping[str, str], packed: Sequence[torch.Tensor]) -> None:
    """Write beside the target, flush to the disk, then rename: a reader sees the old file, the new one, or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {str(i): t.contiguous() for i, t in enumerate(packed)}
    header = dict(told) | {f"sum{name}": _checksum(t) for name, t in tensors.items()}
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata=header)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)  # the rename itself must reach the disk too
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_packed(
    path: Path, request: PackedRequest, told: Mapping[str, str], metas: Sequence[TensorMeta]
) -> list[torch.Tensor] | str | None:
    """The packed tensors, on 64-byte lines; in words why the file cannot be used; None where there is none."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            other = [k for k, v in told.items() if header.get(k) != v]
            if other:
                return f"it says another {other[0]}"
            if len(file.keys()) != len(metas):
                return f"it holds {len(file.keys())} tensors, not {len(metas)}"
            out = [
                experts_native.aligned_empty(m.shape) if m.dtype == torch.uint8 else torch.empty(m.shape, dtype=m.dtype)
                for m in metas
            ]
            if told["layout"].startswith("native"):
                experts_native.place(request.spec, out)
            for i, (tensor, meta) in enumerate(zip(out, metas, strict=True)):
                stored = file.get_tensor(str(i))
                if tuple(stored.shape) != meta.shape or stored.dtype != meta.dtype:
                    return f"tensor {i} is {stored.dtype} {tuple(stored.shape)}"
                tensor.copy_(stored)
                if header.get(f"sum{i}") != _checksum(tensor):
                    return f"the checksum of tensor {i} is wrong"
            return out
    except (OSError, SafetensorError) as error:
        return str(error)


def _checksum(tensor: torch.Tensor) -> str:
    if library.load().library is not None:
        return experts_native.content_hash(tensor)
    data = tensor.detach().view(-1).view(torch.uint8).numpy().data if tensor.numel() else b""
    return f"{zlib.crc32(data):08x}"
