"""A rule file as data: what every other part reads. Each piece remembers the file and line it came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from ktfx.errors import Origin, RuleError
from ktfx.patterns import Expression
from ktfx.text import nearest
from ktfx.yaml_source import Node, read_file, read_python, read_text


@dataclass(frozen=True)
class Where:
    """Further conditions of a match; None where not given.

    dtype: torch's name without prefix (``bfloat16``). device: a device name. phase: ``prefill`` or ``generate``.
    shapes: capture or parameter name → sizes, None for any size.
    """

    dtype: str | None = None
    device: str | None = None
    phase: str | None = None
    shapes: Mapping[str, tuple[int | None, ...]] | None = None


@dataclass(frozen=True)
class Match:
    """What a rule applies to; all that is given must hold.

    name: a regular expression, searched in the module path. cls: dotted class path or bare class name. module: a role.
    layers: decoder layers. pattern: the text of a subgraph pattern. where: further conditions.
    """

    name: str | None = None
    cls: str | None = None
    module: str | None = None
    layers: frozenset[int] | None = None
    pattern: str | None = None
    where: Where | None = None


@dataclass(frozen=True)
class PhaseAction:
    """What a rule says for one phase; None is "not said". ``kt_op``: the operator as a KTransformers file spells it."""

    device: str | None = None
    op: str | None = None
    weights: str | None = None
    kt_op: str | None = None


@dataclass(frozen=True)
class Replace:
    """What a rule does with what it matched.

    with_: the text of the replacement of a pattern. fallback: ``aten`` if an op that cannot take the module may be left
    out. options: further options of the op. kt_class, kt_kwargs: as a KTransformers file gives them.
    """

    prefill: PhaseAction = PhaseAction()
    generate: PhaseAction = PhaseAction()
    out_device: str | None = None
    with_: str | None = None
    fallback: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    kt_class: str | None = None
    kt_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Rule:
    """One rule. ``number`` counts from 1, as errors do. ``pattern`` and ``with_``: the parsed expressions, if any."""

    number: int
    match: Match
    replace: Replace
    recursive: bool
    origin: Origin
    pattern: Expression | None = None
    with_: Expression | None = None
    name_origin: Origin | None = None

    @property
    def label(self) -> str:
        return f"rule {self.number}"

    @property
    def generic(self) -> bool:
        """Matched by role or class alone, by no name: such a rule falls back to aten, with a warning."""
        return self.match.name is None


@dataclass(frozen=True)
class LayerRange:
    """Decoder layers ``first`` to ``last``, both included, go to ``device``."""

    first: int
    last: int
    device: str
    origin: Origin


@dataclass(frozen=True)
class PassRequest:
    """A pass that the file asks for, with its options."""

    name: str
    options: Mapping[str, Any]
    origin: Origin


@dataclass(frozen=True, eq=False)
class Ruleset:
    """A whole rule file.

    dialect: ``ktfx`` or ``ktransformers``. devices: device name → what the file says it is. layers: ranges as written.
    layer_devices: the devices of an even split (``layers: [gpu0, gpu1]``). passes: None for the default pipeline.
    transfer_map: first layer → device of the residual stream from there on. device_origins: every device name in use
    (``cuda`` spelt ``cuda:0``) → its first place. transfer_origins: as transfer_map, the places.
    """

    dialect: str
    rules: tuple[Rule, ...]
    default_device: str
    origin: Origin
    devices: Mapping[str, str] = field(default_factory=dict)
    layers: tuple[LayerRange, ...] = ()
    layer_devices: tuple[str, ...] = ()
    passes: tuple[PassRequest, ...] | None = None
    transfer_map: Mapping[int, str] = field(default_factory=dict)
    device_origins: Mapping[str, Origin] = field(default_factory=dict)
    transfer_origins: Mapping[int, Origin] = field(default_factory=dict)
    layers_origin: Origin | None = None

    @cached_property
    def pattern_rules(self) -> tuple[Rule, ...]:
        """The rules that match subgraphs."""
        return tuple(rule for rule in self.rules if rule.match.pattern is not None)

    @cached_property
    def module_rules(self) -> tuple[Rule, ...]:
        """The rules that match modules."""
        return tuple(rule for rule in self.rules if rule.match.pattern is None)

    def layer_ranges(self, num_layers: int) -> tuple[LayerRange, ...]:
        """The ranges in force for a model of so many layers: those written, or the even split."""
        if not self.layer_devices or num_layers == 0:
            return self.layers
        count = len(self.layer_devices)
        origin = self.layers_origin or self.origin
        bounds = [round(i * num_layers / count) for i in range(count + 1)]
        return tuple(
            LayerRange(first, end - 1, device, origin)
            for device, first, end in zip(self.layer_devices, bounds, bounds[1:], strict=False)
            if end > first
        )


def load_ruleset(source: str | Path | Mapping[str, Any] | Sequence[Any] | Ruleset) -> Ruleset:
    """Read rules from a path, a shipped name (``deepseek-v3-2gpu``, with or without ``.yaml``), or Python data.

    A mapping is read in ktfx's own dialect, a list as a KTransformers file. Raises RuleError, with file, line and
    column, for anything that cannot be read or makes no sense by itself; what needs a model is ``resolve``'s to say.
    """
    from ktfx.rule_parser import parse_rules

    return source if isinstance(source, Ruleset) else parse_rules(read_source(source))


def read_source(source: str | Path | Mapping[str, Any] | Sequence[Any]) -> Node:
    """The nodes of what ``load_ruleset`` takes."""
    if not isinstance(source, str | Path):
        return read_python(source)
    path = Path(source)
    if "\n" in str(source) or len(str(source)) > 4096:
        raise RuleError(
            "YAML text was given where a path or a name is expected",
            expected="a path, or a shipped name: " + ", ".join(shipped_rulesets()),
            mend="use ktfx.ruleset.parse_ruleset for text, or pass the loaded dict",
        )
    try:
        if path.is_file():
            return read_file(path)
    except OSError as error:  # a name too long for the file system
        raise RuleError(f"the path cannot be read: {error.strerror}", mend="check the path") from None
    shipped = shipped_rulesets()
    name = str(source).removesuffix(".yaml")
    if name in shipped:
        file = resources.files("ktfx.rules").joinpath(f"{name}.yaml")
        return read_text(file.read_text(encoding="utf-8"), f"{name}.yaml")
    if path.is_dir():
        raise RuleError("a directory is no rule file", origin=Origin(str(path)), mend="name the .yaml file in it")
    meant = nearest(name, shipped)
    raise RuleError(
        f"no such rule file: {str(source)[:200]!r}",
        expected="a path, or a shipped name: " + (", ".join(shipped) or "(none are shipped)"),
        mend=f"did you mean {meant!r}?" if meant else "check the path",
    )


def parse_ruleset(text: str, file: str = "<text>") -> Ruleset:
    """Read rules from YAML text; ``file`` is what errors call it."""
    from ktfx.rule_parser import parse_rules

    return parse_rules(read_text(text, file))


def shipped_rulesets() -> list[str]:
    """The names of the rule files that ship with ktfx, without ``.yaml``."""
    return sorted(
        item.name.removesuffix(".yaml")
        for item in resources.files("ktfx.rules").iterdir()
        if item.name.endswith(".yaml")
    )
