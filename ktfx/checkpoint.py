"""A model's own safetensors files, read again piece by piece: expert tensors in the model's layout.

Two ways of writing experts are known: one stacked tensor under the parameter's own name, and one matrix an expert
(``experts.7.gate_proj.weight``, or Mixtral's ``w1``). Whether a file really holds what the model computes with is for
the caller to check once (``matches``); after that the files are only read while they are the same files.
"""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ktfx.errors import WeightError

# What a checkpoint may call the matrices of one expert: gate, up, down.
EXPERT_MATRICES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
EXPERT_PATHS = (("", ""), (".mlp.", ".block_sparse_moe."), (".feed_forward.", ".mlp."))


@dataclass(frozen=True)
class FileStamp:
    """A file as it was: size in bytes, time of change in nanoseconds."""

    size: int
    changed: int

    @staticmethod
    def of(path: Path) -> FileStamp:
        stat = os.stat(path)
        return FileStamp(stat.st_size, stat.st_mtime_ns)


@dataclass(frozen=True)
class Checkpoint:
    """where: tensor name → its file. stamps: each file as it was when the checkpoint was opened."""

    directory: Path
    where: dict[str, Path]
    stamps: dict[Path, FileStamp]

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """A tensor, or a range of its first dimension. WeightError if its file is gone or was changed."""
        from safetensors import safe_open

        self.check_unchanged(name)
        with safe_open(self.where[name], framework="pt") as file:
            return file.get_tensor(name) if rows is None else file.get_slice(name)[rows]

    def check_unchanged(self, name: str) -> None:
        """WeightError if the file of a tensor is gone or was changed since the checkpoint was opened."""
        path = self.where[name]
        if not path.is_file() or FileStamp.of(path) != self.stamps[path]:
            raise WeightError(
                f"{path} was changed or removed while a compiled model reads its weights from it",
                module=name,
                expected="the file that the model was loaded from",
                mend="put it back, or compile with release_host=False or 'lossy'",
            )


class TensorFiles:
    """A checkpoint's files held open while many of their tensors are read; a context."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._stack = ExitStack()
        self._open: dict[Path, Any] = {}

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self.checkpoint.where

    def read(self, name: str) -> torch.Tensor:
        """A tensor. WeightError if its file is gone, was changed, or holds no tensor of that name."""
        from safetensors import SafetensorError, safe_open

        path = self.checkpoint.where[name]
        if path not in self._open:
            self.checkpoint.check_unchanged(name)
            self._open[path] = self._stack.enter_context(safe_open(path, framework="pt"))
        try:
            return self._open[path].get_tensor(name)
        except SafetensorError as error:
            raise WeightError(
                f"{path} cannot give the tensor: {error}",
                module=name,
                expected="the tensors that model.safetensors.index.json says it holds",
                mend="download the checkpoint again",
            ) from error


def open_checkpoint(directory: Path | str | None) -> Checkpoint | None:
    """The safetensors files of a local model directory; None where there are none. Reads headers only."""
    from safetensors import SafetensorError, safe_open

    if not directory or not Path(directory).is_dir():
        return None
    folder = Path(directory).resolve()
    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors"))
    where: dict[str, Path] = {}
    try:
        if index.is_file():
            where = {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        else:
            for path in files:
                with safe_open(path, framework="pt") as file:
                    where |= dict.fromkeys(file.keys(), path)
        return Checkpoint(folder, where, {p: FileStamp.of(p) for p in set(where.values())}) if where else None
    except (OSError, ValueError, KeyError, SafetensorError):
        return None


@dataclass(frozen=True)
class ExpertsReader:
    """One parameter of an experts module in a checkpoint.

    pieces: for each expert its matrices, one above the other; empty where ``stacked`` names one tensor for all.
    """

    checkpoint: Checkpoint
    dtype: torch.dtype
    shape: tuple[int, ...]
    stacked: str = ""
    pieces: tuple[tuple[str, ...], ...] = ()

    def read(self, experts: range) -> torch.Tensor:
        """(len(experts), …) in the model's layout and dtype."""
        if self.stacked:
            found = self.checkpoint.read(self.stacked, slice(experts.start, experts.stop))
        else:
            found = torch.empty(len(experts), *self.shape[1:], dtype=self.dtype)
            for row, e in zip(found, experts, strict=True):
                begin = 0
                for name in self.pieces[e]:
                    matrix = self.checkpoint.read(name)
                    row[begin : begin + matrix.shape[0]].copy_(matrix)
                    begin += matrix.shape[0]
        return found.to(self.dtype)

    def matches(self, tensor: torch.Tensor) -> bool:
        """Whether the files hold this very tensor, bit for bit; one expert at a time."""
        try:
            return all(torch.equal(self.read(range(e, e + 1))[0], tensor[e].cpu()) for e in range(self.shape[0]))
        except (RuntimeError, ValueError):  # shapes that do not fit
            return False


def experts_reader(
    checkpoint: Checkpoint | None, name: str, part: str, shape: tuple[int, ...], dtype: torch.dtype, plain: bool
) -> ExpertsReader | None:
    """Where a checkpoint keeps the parameter ``name`` (``…experts.gate_up_proj``), or None.

    part: ``gate_up``, ``down``, ``gate_up_bias`` or ``down_bias``. plain: the parameter is (E, out, in) with the gate
    rows first, so that matrices of single experts stand in it as they are.
    """
    if checkpoint is None:
        return None
    if name in checkpoint.where:
        return ExpertsReader(checkpoint, dtype, shape, stacked=name)
    if part not in ("gate_up", "down") or not plain:
        return None
    path = name.rpartition(".")[0]
    for old, new in EXPERT_PATHS:
        for gate, up, down in EXPERT_MATRICES:
            prefix = path.replace(old, new) if old else path
            wanted = (gate, up) if part == "gate_up" else (down,)
            pieces = tuple(tuple(f"{prefix}.{e}.{leaf}.weight" for leaf in wanted) for e in range(shape[0]))
            if all(piece in checkpoint.where for names in pieces for piece in names):
                return ExpertsReader(checkpoint, dtype, shape, pieces=pieces)
    return None
