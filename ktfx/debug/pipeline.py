"""The passes there are, and the pipeline a rule file comes to, each value with the place it came from."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any

from ktfx.debug.snapshot import short_path
from ktfx.errors import Origin
from ktfx.ops import load_ops
from ktfx.options import RulesSource
from ktfx.pass_manager import DEFAULT_PIPELINE, REQUIRED, Pass, build_pipeline, registered_passes
from ktfx.ruleset import Ruleset, load_ruleset, read_source
from ktfx.yaml_source import Items, Node, Table


@dataclass(frozen=True)
class OptionRow:
    """One option of a pass. description: from the options' docstring or the field's ``metadata['doc']``."""

    name: str
    type: str
    default: Any
    description: str


@dataclass(frozen=True)
class PassRow:
    """One registered pass. in_default: it runs where a rule file has no ``passes:``. required: it always runs."""

    name: str
    file: str
    line: int
    summary: str
    options: tuple[OptionRow, ...]
    requires: tuple[str, ...]
    provides: tuple[str, ...]
    numerics_preserving: bool
    in_default: bool
    required: bool


def pass_rows() -> list[PassRow]:
    """Every pass by name: those of the default pipeline first, in its order."""
    load_ops()
    known = registered_passes()
    order = [n for n in DEFAULT_PIPELINE if n in known]
    return [_row(known[name]) for name in [*order, *sorted(set(known) - set(order))]]


def _row(cls: type[Pass]) -> PassRow:
    file, line = _place(cls)
    return PassRow(
        name=cls.name,
        file=file,
        line=line,
        summary=" ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split()),
        options=tuple(_option(cls, f) for f in fields(cls.Options)),
        requires=tuple(cls.requires),
        provides=tuple(getattr(cls, "provides", ())),
        numerics_preserving=cls.numerics_preserving,
        in_default=cls.name in DEFAULT_PIPELINE,
        required=cls.name in REQUIRED,
    )


def _place(cls: type) -> tuple[str, int]:
    try:
        return short_path(inspect.getsourcefile(cls) or ""), inspect.getsourcelines(cls)[1]
    except (OSError, TypeError):  # a class made without a file
        return "", 0


def _option(cls: type[Pass], field: Field[Any]) -> OptionRow:
    default = field.default
    if default is MISSING and field.default_factory is not MISSING:
        default = field.default_factory()
    kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
    described = field.metadata.get("doc") or _described(cls.Options, field.name)
    return OptionRow(field.name, kind, None if default is MISSING else default, str(described))


def _described(options: type, name: str) -> str:
    """The text after ``name:`` in the options' docstring, to the next such heading."""
    text = inspect.getdoc(options) or ""
    names = "|".join(re.escape(f.name) for f in fields(options))
    found = re.search(rf"(?:^|\s){re.escape(name)}: (.*?)(?=\s(?:{names}): |\Z)", text, re.DOTALL)
    return " ".join(found[1].split()) if found else ""


@dataclass(frozen=True)
class ValueRow:
    """One value of a resolved pipeline. origin: ``file:line:column``, or what else decided it."""

    name: str
    value: Any
    origin: str


@dataclass(frozen=True)
class StepRow:
    """One pass of a resolved pipeline."""

    number: int
    name: str
    origin: str
    options: tuple[ValueRow, ...]


def resolved_pipeline(rules: RulesSource) -> list[StepRow]:
    """The passes in the order of the run. Raises RuleError as a compile would."""
    assert rules is not None
    load_ops()
    ruleset = load_ruleset(rules)
    pipeline = build_pipeline(ruleset.passes)
    written = _option_origins(read_source(rules)) if ruleset.dialect == "ktfx" else []
    waiting = list(ruleset.passes or ())
    rows: list[StepRow] = []
    for number, current in enumerate(pipeline, 1):
        origins: Mapping[str, Origin] = {}
        if waiting and waiting[0].name == current.name:
            origin = str(waiting.pop(0).origin)
            origins = written[len(ruleset.passes or ()) - len(waiting) - 1]
        else:
            origin = "required" if ruleset.passes is not None else "default pipeline"
        file, line = _place(type(current))
        rows.append(
            StepRow(
                number,
                current.name,
                origin,
                tuple(
                    ValueRow(
                        f.name,
                        getattr(current.options, f.name),
                        str(origins[f.name]) if f.name in origins else f"default, {file}:{line}",
                    )
                    for f in fields(current.options)
                ),
            )
        )
    return rows


def settings(ruleset: Ruleset) -> list[ValueRow]:
    """What else the rule file decides for the pipeline: devices, layers, the default device."""
    rows = [ValueRow("default_device", ruleset.default_device, str(ruleset.origin))]
    for name, device in ruleset.devices.items():
        rows.append(ValueRow(f"devices.{name}", device, str(ruleset.device_origins.get(name, ruleset.origin))))
    for entry in ruleset.layers:
        rows.append(ValueRow(f"layers.{entry.first}-{entry.last}", entry.device, str(entry.origin)))
    if ruleset.layer_devices:
        rows.append(ValueRow("layers", list(ruleset.layer_devices), str(ruleset.layers_origin or ruleset.origin)))
    return rows


def _option_origins(node: Node) -> list[dict[str, Origin]]:
    """For each entry of ``passes:``, its options' places."""
    passes = node.get("passes") if isinstance(node, Table) else None
    found: list[dict[str, Origin]] = []
    for entry in passes.items if isinstance(passes, Items) else ():
        options = entry.entries[0].value if isinstance(entry, Table) and entry.entries else None
        found.append({e.key.text: e.key.origin for e in options.entries} if isinstance(options, Table) else {})
    return found
