"""Snapshot → a runnable Python program, with shapes, module paths, devices and source lines as comments."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from ktfx.debug.snapshot import InputLine, NodeLine, Snapshot
from ktfx.pass_manager import PassContext

_OPS = re.compile(r"= ([a-z_0-9]+)\.\w+\.\w+\(")
_INLINE = 256


def program_text(shot: Snapshot, title: str, packed: Mapping[str, str] | None = None) -> str:
    """The whole file. title: its first line. packed: name of a packed placeholder → its ``Packed(...)`` text.

    Where module, device or rule change, a ruled comment says so; where the source line changes, it is quoted.
    """
    namespaces = _namespaces(shot)
    body = _body(shot)
    modules = [name for name in ("math", "operator") if f"{name}." in body]
    lines = [
        f'"""{title}',
        "",
        "Run it: python FILE            on made-up weights, the same for every dump of this trace",
        "        python FILE inputs.pt  on the tensors that `ktfx trace --inputs` saved",
        '"""',
        "",
        *[f"import {name}" for name in modules],
        *([""] if modules else []),
        "import torch",
        "from ktfx.debug.runtime import Input, Packed, main, register_ops",
        "",
        f"register_ops({namespaces!r})",
        *[f"{n} = torch.ops.{n}" for n in namespaces],
        "",
        *_attributes(shot),
        "INPUTS = {",
        *[f"    {i.name!r}: {_input_text(i, packed or {})},  # {i.form}" for i in shot.inputs],
        "}",
        "",
        "",
        *_function("forward", shot, body),
        "",
        "",
        'if __name__ == "__main__":',
        "    main(forward, INPUTS)",
        "",
    ]
    return "\n".join(lines)


def with_title(program: str, title: str) -> str:
    """The same program under another title."""
    return f'"""{title}\n' + program.partition("\n")[2]


def _function(name: str, shot: Snapshot, body: str) -> list[str]:
    return [
        f"def {name}(",
        *[f"    {i.name},  # {i.form}  {i.kind} {i.source}" + _notes(i) for i in shot.inputs],
        "):",
        body,
    ]


def _notes(entry: InputLine) -> str:
    notes = [f"on {entry.home}"] if entry.home else []
    return "".join(f", {n}" for n in [*notes, *(["written to"] if entry.mutated else [])])


def _body(shot: Snapshot) -> str:
    lines: list[str] = []
    region, quoted = "", ""
    for node in shot.nodes:
        header = region_header(node)
        if header != region:
            lines += [f"    # ── {header}"]
            region, quoted = header, ""
        if node.source and node.source != quoted:
            lines.append(f"    # {node.source}  {node.code}")
            quoted = node.source
        lines.append(f"    {node.text}  # {node.form}" if node.form else f"    {node.text}")
    lines.append(f"    return {shot.returns}")
    return "\n".join(lines)


def region_header(node: NodeLine) -> str:
    """``model.layers.0.mlp.experts (Qwen3MoeExperts) on host, rule 1``."""
    parts = node.module or "the model"
    if node.cls:
        parts += f" ({node.cls})"
    if node.device:
        parts += f" on {node.device}"
    return f"{parts}, {node.rule}" if node.rule else parts


def _namespaces(shot: Snapshot) -> list[str]:
    found = {m[1] for n in shot.nodes if (m := _OPS.search(n.text))}
    for inner in shot.subgraphs.values():
        found |= set(_namespaces(inner))
    return sorted(found - {"torch", "operator", "math"} | {"aten"})


def _attributes(shot: Snapshot) -> list[str]:
    """Tensors and subgraphs that the graph holds itself. Big tensors are beside the program, in ``constants.pt``."""
    if not shot.constants and not shot.subgraphs:
        return []
    lines: list[str] = []
    for position, inner in enumerate(shot.subgraphs.values()):
        lines += [*_function(f"subgraph_{position}", inner, _body(inner)), "", ""]
    lines.append("ATTRIBUTES = {")
    for position, name in enumerate(shot.subgraphs):
        lines.append(f"    {name!r}: subgraph_{position},")
    for name, tensor in shot.constants.items():
        lines.append(f"    {name!r}: {_tensor_text(name, tensor)},")
    return [*lines, "}", ""]


def is_big(tensor: torch.Tensor) -> bool:
    return tensor.numel() > _INLINE


def _tensor_text(name: str, tensor: torch.Tensor) -> str:
    if is_big(tensor):
        return f"torch.load(__import__('pathlib').Path(__file__).parent.parent / 'constants.pt')[{name!r}]"
    return f"torch.tensor({tensor.tolist()!r}, dtype={tensor.dtype}).reshape({tuple(tensor.shape)!r})"


def _input_text(entry: InputLine, packed: Mapping[str, str]) -> str:
    if entry.name in packed:
        return packed[entry.name]
    value = packed.get(f"value of {entry.name}")
    ending = f", value={value}" if value is not None else ""
    return f"Input({entry.kind!r}, {entry.source!r}, {entry.dtype!r}, {entry.shape!r}{ending})"


def packed_texts(
    shot: Snapshot, context: PassContext | None, values: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """What ``program_text`` needs beside the snapshot: how weights are packed, small integer inputs' values."""
    texts: dict[str, str] = {}
    for entry in shot.inputs:
        weight = context.packed.get(entry.name) if context is not None else None
        if weight is not None and context is not None:
            parts = []
            for part, name in weight.request.parts:
                tensor = _parameter(context, name)
                parts.append((part, name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)))
            texts[entry.name] = (
                f"Packed({weight.request.kernel!r}, {weight.request.spec_text!r}, {tuple(parts)!r}, {weight.index})"
            )
        value = (values or {}).get(entry.name)
        if isinstance(value, torch.Tensor) and not value.dtype.is_floating_point and value.numel() <= _INLINE:
            texts[f"value of {entry.name}"] = repr(value.tolist())
        elif isinstance(value, int):
            texts[f"value of {entry.name}"] = repr(value)
    return texts


def _parameter(context: PassContext, name: str) -> torch.Tensor:
    path, _, leaf = name.rpartition(".")
    tensor = getattr(context.captured.model.get_submodule(path), leaf)
    assert isinstance(tensor, torch.Tensor)
    return tensor
