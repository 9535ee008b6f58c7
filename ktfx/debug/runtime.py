"""What a dumped program needs to run by itself: inputs of the right form, the same for every dump of one trace."""

from __future__ import annotations

import importlib
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ktfx.errors import KtfxError, WeightError


@dataclass(frozen=True)
class Input:
    """One argument of a dumped program. value: given where the trace kept it (small integers), else made up."""

    kind: str
    source: str
    dtype: str
    shape: tuple[int, ...]
    value: Any = None


@dataclass(frozen=True)
class Packed:
    """An argument that a kernel's ``pack`` makes from parameters. parts: (part, parameter, dtype, shape)."""

    kernel: str
    spec: str
    parts: tuple[tuple[str, str, str, tuple[int, ...]], ...]
    index: int


def register_ops(namespaces: Sequence[str]) -> None:
    """Import what defines the ops that the program calls."""
    from ktfx.ops import load_ops

    load_ops()
    if "transformers" in namespaces:
        importlib.import_module("transformers.integrations.moe")


def make_inputs(inputs: Mapping[str, Input | Packed], saved: Mapping[str, torch.Tensor] | None = None) -> list[Any]:
    """The arguments in order: saved tensors where there are, else random ones seeded by the parameter's name.

    A packed weight is packed from the same made-up parameters that the graph before the rewrite reads, so two dumps of
    one trace compute the same.
    """
    saved = saved or {}
    values: list[Any] = []
    for name, entry in inputs.items():
        if name in saved:
            values.append(saved[name])
        elif isinstance(entry, Packed):
            values.append(_pack(entry, saved)[entry.index])
        else:
            values.append(made_up(entry))
    return values


def _pack(entry: Packed, saved: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    from ktfx.weight_requests import request_of

    tensors = {
        part: saved.get(f"parameter {name}", _random(name, dtype, shape)) for part, name, dtype, shape in entry.parts
    }
    request = request_of(entry.kernel, entry.spec, tuple((part, name) for part, name, _, _ in entry.parts))
    return request.pack(tensors, torch.device("cpu"))


def made_up(entry: Input) -> Any:
    """The value given for an argument, or a random one by its name: the same at every call."""
    if entry.dtype == "int":
        return int(entry.value if entry.value is not None else entry.shape[0])
    if entry.value is not None:
        return torch.tensor(entry.value, dtype=getattr(torch, entry.dtype)).reshape(entry.shape)
    return _random(entry.source, entry.dtype, entry.shape)


def _random(name: str, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Weights near those of an initialised model: matrices N(0, 0.02), vectors 1 + N(0, 0.02); integers are 0."""
    kind = getattr(torch, dtype)
    if not kind.is_floating_point:
        return torch.zeros(shape, dtype=kind)
    seeded = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    value = torch.randn(shape, generator=seeded) * 0.02
    return (value + 1 if len(shape) == 1 else value).to(kind)


def main(
    forward: Callable[..., Any], inputs: Mapping[str, Input | Packed], arguments: Sequence[str] | None = None
) -> None:
    """Run a dumped program: ``python after.py [inputs.pt]``; prints a line for each output."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    saved = load_inputs(Path(given[0])) if given else None
    with torch.no_grad():
        outputs = forward(*make_inputs(inputs, saved))
    for position, value in enumerate(outputs):
        print(f"output {position}: {describe(value)}")


def load_inputs(path: Path) -> dict[str, torch.Tensor]:
    try:
        return dict(torch.load(path, weights_only=True))
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise WeightError(
            f"{path} holds no saved inputs: {error}", mend="ktfx trace --inputs writes inputs.pt"
        ) from None


def describe(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    x = value.detach().double().flatten()
    norm = float(torch.linalg.vector_norm(x)) if x.numel() else 0.0
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} norm {norm:.6g}"


def load_program(path: Path) -> tuple[Callable[..., Any], dict[str, Input | Packed]]:
    """``forward`` and ``INPUTS`` of a dumped program, without running it."""
    import runpy

    if not path.is_file():
        raise KtfxError(f"no dumped program at {path}", mend="ktfx trace writes before.py and after.py for each pass")
    names = runpy.run_path(str(path), run_name="ktfx_dump")
    return names["forward"], names["INPUTS"]
