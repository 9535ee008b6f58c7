"""Ruleset × module tree → a placement for every module. Needs no trace and no weights: the model may be on ``meta``.

How a module gets its place, in ktfx's dialect:

1. the first rule, top to bottom, that matches it; what the rule leaves open (an op without a device) comes from 2;
2. else the nearest of: a rule with a device on an ancestor ("inherited"; a rule for ``model.layers.3.mlp`` moves its
   Linears, unless they have rules of their own), and the ``layers:`` entry of its layer ("layers");
3. else ``default_device`` ("default").

Only devices are inherited, never ops or weight formats. Under ``recursive: false`` no rule and no ``layers:`` entry
applies: what lies inside follows the matched module. An op that runs on the host only, with no device given, runs on
the first name in ``devices:`` that stands for the host. A format without an op means the kernel of the device:
``experts.cpu`` or ``linear.cpu`` on the host, ``….triton`` elsewhere.

In KTransformers' dialect nothing is inherited (but under ``recursive: false``): an unmatched module goes to ``cuda:0``.
A phase for which a rule gives neither device nor op takes the other phase's, which is what KTransformers itself does:
it runs its prefill with the generate operator.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from torch import nn

from ktfx import kt_compat
from ktfx.devices import is_host, written_device
from ktfx.errors import Origin, PlacementError
from ktfx.op_names import family, fits, roles_for, runs_on_host
from ktfx.roles import decoder_layers, layer_within, roles_of
from ktfx.ruleset import PhaseAction, Rule, Ruleset

PHASES = ("prefill", "generate")


@dataclass(frozen=True)
class PhasePlacement:
    """Where a module is in one phase, and as what. ``op`` None or ``aten``: the model's own arithmetic."""

    device: str
    op: str | None = None
    weights: str | None = None


@dataclass(frozen=True)
class ModulePlacement:
    """The place of one module.

    cls: dotted class. layer: number of its decoder layer. rule: the rule that matched it. reason: ``rule``, ``layers``,
    ``default`` or ``inherited`` (then ``inherited_from`` is the module whose rule it follows).
    """

    module: str
    cls: str
    role: str | None
    layer: int | None
    rule: Rule | None
    reason: str
    prefill: PhasePlacement
    generate: PhasePlacement
    out_device: str | None = None
    inherited_from: str | None = None

    def at(self, phase: str) -> PhasePlacement:
        """The placement in ``prefill`` or ``generate``."""
        return self.prefill if phase == "prefill" else self.generate


@dataclass(frozen=True)
class Note:
    """Something about the rules and this model that the user may not have meant. ``code``: one of lint's."""

    code: str
    message: str
    origin: Origin
    rule: str | None = None

    def __str__(self) -> str:
        return f"{self.origin}: " + (f"{self.rule}: " if self.rule else "") + self.message


@dataclass(frozen=True)
class Resolution:
    """Every module's placement. ``layers_path``: the list that holds the decoder layers.

    warnings: ``notes`` as text. transfer_map: the one in force: a KTransformers file's, if its rule matched a module;
    else empty.
    """

    ruleset: Ruleset
    placements: dict[str, ModulePlacement]
    warnings: tuple[str, ...]
    num_layers: int
    notes: tuple[Note, ...] = ()
    layers_path: str | None = None
    transfer_map: Mapping[int, str] = field(default_factory=dict)

    def of(self, path: str) -> ModulePlacement:
        """The placement of a module path, or of its nearest ancestor that the model has."""
        while path not in self.placements:
            if not path:
                raise KeyError("the resolution has no root module")
            path = path.rpartition(".")[0]
        return self.placements[path]

    def glue_device(self, path: str, phase: str) -> str:
        """Where a node runs that belongs to module ``path`` itself and to none of its children.

        Residual sums, masks, the glue of a block: the module's own device; but where a ``transfer_map`` is in force,
        what belongs to a decoder layer itself follows the map.
        """
        placement = self.of(path)
        if self.transfer_map and placement.layer is not None and placement.module == self.layer_path(placement.layer):
            return self.stream_device(placement.layer)
        return placement.at(phase).device

    def stream_device(self, layer: int) -> str:
        """The device of the residual stream in a decoder layer, by the ``transfer_map``."""
        device = self.ruleset.default_device
        for first in sorted(self.transfer_map):
            if first <= layer:
                device = self.transfer_map[first]
        return device

    def layer_path(self, layer: int) -> str:
        return f"{self.layers_path}.{layer}" if self.layers_path else str(layer)

    def device_names(self) -> list[str]:
        """The device names in use, in the order of the model's modules, each once."""
        names: dict[str, None] = {}
        for placement in self.placements.values():
            for name in (placement.prefill.device, placement.generate.device, placement.out_device):
                if name is not None:
                    names[name] = None
        names |= dict.fromkeys(self.transfer_map.values())
        return list(names)

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Module path → its placement as plain data.

        ``class`` and the keys of ``kwargs`` are as the rule gives them: in a KTransformers file an absent kwarg is
        null, never inferred. ``resolved`` is what ktfx makes of it, by phase.
        """
        return {path: self._entry(placement) for path, placement in self.placements.items()}

    def _entry(self, placement: ModulePlacement) -> dict[str, Any]:
        rule = placement.rule
        if rule is not None and rule.replace.kt_class is not None:
            kwargs = dict(rule.replace.kt_kwargs)
            if isinstance(kwargs.get("transfer_map"), dict):
                kwargs["transfer_map"] = {str(layer): device for layer, device in kwargs["transfer_map"].items()}
        else:
            kwargs = {"generate_device": placement.generate.device, "prefill_device": placement.prefill.device}
            for key, value in (
                ("generate_op", placement.generate.op),
                ("prefill_op", placement.prefill.op),
                ("out_device", placement.out_device),
            ):
                if value is not None:
                    kwargs[key] = value
        return {
            "rule": rule.number if rule else None,
            "file": rule.origin.file if rule else None,
            "line": rule.origin.line if rule and rule.origin.line else None,
            "class": (rule.replace.kt_class if rule else None) or kt_compat.DEFAULT_CLASS,
            **{
                key: kwargs.get(key)
                for key in (
                    "generate_device",
                    "prefill_device",
                    "generate_op",
                    "prefill_op",
                    "out_device",
                    "transfer_map",
                )
            },
            "kwargs": kwargs,
            "reason": placement.reason,
            "inherited_from": placement.inherited_from,
            "module_class": placement.cls,
            "role": placement.role,
            "layer": placement.layer,
            "resolved": {
                phase: {
                    "device": placement.at(phase).device,
                    "op": placement.at(phase).op,
                    "weights": placement.at(phase).weights,
                }
                for phase in PHASES
            },
        }


def resolve(ruleset: Ruleset, model: nn.Module) -> Resolution:
    """Place every module of ``model`` by the rules.

    Raises PlacementError where a rule cannot hold for this model: an op of another family than the module, an op for
    the host on a GPU, a ``transfer_map`` past the last layer.
    """
    return _Resolver(ruleset, model).resolve()


def matching_rule(ruleset: Ruleset, facts: ModuleFacts) -> Rule | None:
    """The first module rule that matches, or None."""
    return next((rule for rule in ruleset.module_rules if rule_matches(rule, facts)), None)


@dataclass(frozen=True)
class ModuleFacts:
    """What a match may ask about a module. ``old_path``: its path before transformers 5, if that was another.

    devices: the devices it would get without a rule, by phase. written: what these names stand for in the rule file.
    """

    path: str
    module: nn.Module
    role: str | None
    layer: int | None
    old_path: str | None = None
    devices: tuple[str, ...] = ()
    written: tuple[str, ...] = ()


def rule_matches(rule: Rule, facts: ModuleFacts) -> bool:
    """Whether all that ``rule.match`` asks of a module holds."""
    match = rule.match
    if match.pattern is not None:
        return False
    if match.module is not None and match.module != facts.role:
        return False
    if match.layers is not None and facts.layer not in match.layers:
        return False
    if match.name is not None and not name_matches(match.name, facts):
        return False
    kind: Any = getattr(facts.module, "stands_for", None) or type(facts.module)
    if match.cls is not None and not class_matches(match.cls, kind, facts.role):
        return False
    where = match.where
    if where is None:
        return True
    if where.dtype is not None:
        first = next((p for p in facts.module.parameters() if p.is_floating_point()), None)
        if first is None or str(first.dtype).removeprefix("torch.") != where.dtype:
            return False
    if where.device is not None and where.device not in (*facts.devices, *(w.split(":")[0] for w in facts.written)):
        return False
    own = dict(facts.module.named_parameters(recurse=False))
    return all(name in own and _same_shape(own[name].shape, sizes) for name, sizes in (where.shapes or {}).items())


def name_matches(pattern: str, facts: ModuleFacts) -> bool:
    """``re.search`` on the module's path, and on the one it had before transformers 5."""
    search = re.compile(pattern).search
    return bool(search(facts.path)) or (facts.old_path is not None and bool(search(facts.old_path)))


@lru_cache(maxsize=65536)
def class_matches(path: str, cls: Any, role: str | None) -> bool:
    """Whether ``cls`` is, or derives from, the class at a dotted path (or of a bare name).

    Nothing is imported: a class that exists in a model is in a module that is loaded. KTransformers' model classes
    stand for those of transformers.
    """
    if kt_compat.is_model_class(path):
        return kt_compat.stands_for(path, cls, role)
    found = _loaded_object(path)
    if isinstance(found, type):
        return issubclass(cls, found)
    return any(path in (base.__name__, f"{base.__module__}.{base.__qualname__}") for base in cls.__mro__)


def _loaded_object(path: str) -> object | None:
    module_path, _, name = path.rpartition(".")
    module = sys.modules.get(module_path)
    return getattr(module, name, None) if module is not None else None


def _same_shape(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(w is None or w == s for s, w in zip(shape, wanted, strict=True))


def class_path(module: nn.Module) -> str:
    """The dotted path of a module's class, as error messages and tables show it."""
    cls = type(module)
    return f"{cls.__module__}.{cls.__qualname__}"


@dataclass(frozen=True)
class _State:
    """What a module gets without a rule of its own."""

    reason: str
    prefill: str
    generate: str
    source: str | None = None
    rules_apply: bool = True


class _Resolver:
    def __init__(self, ruleset: Ruleset, model: nn.Module) -> None:
        self.ruleset = ruleset
        self.model = model
        self.kt = ruleset.dialect == "ktransformers"
        self.layers_path = decoder_layers(model)
        layers = model.get_submodule(self.layers_path) if self.layers_path is not None else ()
        self.num_layers = len(list(layers.children())) if isinstance(layers, nn.Module) else 0
        self.roles = roles_of(model)
        self.family = kt_compat.family_of_model(model)
        self.ranges = ruleset.layer_ranges(self.num_layers)
        self.placements: dict[str, ModulePlacement] = {}
        self.notes: dict[Note, None] = {}

    def resolve(self) -> Resolution:
        self.check_layers()
        self.check_transfer_map()
        device = self.ruleset.default_device
        self.place("", self.model, _State("default", device, device))
        transfer_map = self.ruleset.transfer_map if self.transfer_rule_matched() else {}
        return Resolution(
            self.ruleset,
            self.placements,
            tuple(str(note) for note in self.notes),
            self.num_layers,
            tuple(self.notes),
            self.layers_path,
            transfer_map,
        )

    def note(self, code: str, message: str, origin: Origin, rule: str | None = None) -> None:
        self.notes[Note(code, message, origin, rule)] = None

    # ---- the file against the model's depth

    def check_layers(self) -> None:
        last = self.num_layers - 1
        covered: set[int] = set()
        for entry in self.ranges:
            covered |= set(range(entry.first, min(entry.last, last) + 1))
            if entry.first > last:
                self.note(
                    "dead-layers",
                    f"layers {entry.first}-{entry.last} do not exist: the model has {self.num_layers} layers "
                    f"(0-{last}), so nothing goes to {entry.device} by this range",
                    entry.origin,
                )
            elif entry.last > last:
                self.note(
                    "layers-past-end",
                    f"layers {entry.first}-{entry.last} reach past the last layer, {last}",
                    entry.origin,
                )
        gaps = sorted(set(range(self.num_layers)) - covered) if self.ranges else []
        if gaps:
            self.note(
                "layer-gap",
                f"`layers:` leaves out {ranges_text(gaps)}: they go to the default device, "
                f"{self.ruleset.default_device}",
                self.ruleset.layers_origin or self.ruleset.origin,
            )

    def check_transfer_map(self) -> None:
        for layer, device in self.ruleset.transfer_map.items():
            if layer < self.num_layers:
                continue
            raise PlacementError(
                f"transfer_map moves to {device} before layer {layer}, but the model has {self.num_layers} layers",
                origin=self.ruleset.transfer_origins.get(layer, self.ruleset.origin),
                rule=next((r.label for r in self.ruleset.rules if "transfer_map" in r.replace.kt_kwargs), None),
                expected=f"a layer from 0 to {self.num_layers - 1}"
                if self.num_layers
                else "a model with decoder layers",
                mend="use a rule file made for this model, or change the layer",
            )

    def transfer_rule_matched(self) -> bool:
        owners = [rule for rule in self.ruleset.rules if "transfer_map" in rule.replace.kt_kwargs]
        if not owners:
            return False
        placed = {id(p.rule) for p in self.placements.values() if p.rule is not None}
        if any(id(rule) in placed for rule in owners):
            return True
        holder = (self.layers_path or "").rpartition(".")[0] or "model"
        self.note(
            "transfer-map-unused",
            "the rule has a transfer_map but places no module, so the map is not used; "
            f"match the module that holds the layers ({holder!r})",
            owners[0].origin,
            owners[0].label,
        )
        return False

    # ---- the walk

    def place(self, path: str, module: nn.Module, state: _State) -> None:
        role = self.roles[path]
        layer = layer_within(path, self.layers_path)
        if layer is not None and state.rules_apply and path == self.layer_module(layer):
            state = self.enter_layer(layer, state)
        facts = ModuleFacts(
            path,
            module,
            role,
            layer,
            kt_compat.old_path(path, self.family) if self.kt else None,
            (state.prefill, state.generate),
            tuple(written_device(name, self.ruleset.devices) for name in (state.prefill, state.generate)),
        )
        rule = matching_rule(self.ruleset, facts) if state.rules_apply else None
        if rule is None:
            placement = ModulePlacement(
                path,
                class_path(module),
                role,
                layer,
                None,
                state.reason,
                PhasePlacement(state.prefill),
                PhasePlacement(state.generate),
                inherited_from=state.source if state.reason == "inherited" else None,
            )
            inner = state
        else:
            placement = self.by_rule(rule, facts, state)
            inner = self.inside(rule, placement, state)
        self.placements[path] = placement
        for name, child in module.named_children():
            self.place(f"{path}.{name}" if path else name, child, inner)

    def layer_module(self, layer: int) -> str:
        return f"{self.layers_path}.{layer}" if self.layers_path else str(layer)

    def enter_layer(self, layer: int, state: _State) -> _State:
        for entry in self.ranges:
            if entry.first <= layer <= entry.last:
                return _State("layers", entry.device, entry.device)
        return state

    def by_rule(self, rule: Rule, facts: ModuleFacts, state: _State) -> ModulePlacement:
        prefill, generate = rule.replace.prefill, rule.replace.generate
        if rule.replace.kt_class is not None:
            prefill, generate = _other_phase(prefill, generate), _other_phase(generate, prefill)
            self.kt_notes(rule)
        return ModulePlacement(
            facts.path,
            class_path(facts.module),
            facts.role,
            facts.layer,
            rule,
            "rule",
            self.phase(rule, prefill, facts, state.prefill),
            self.phase(rule, generate, facts, state.generate),
            rule.replace.out_device,
        )

    def inside(self, rule: Rule, placement: ModulePlacement, state: _State) -> _State:
        """What the children of a matched module get without rules of their own."""
        moved = _State(
            "inherited", placement.prefill.device, placement.generate.device, placement.module, rule.recursive
        )
        if not rule.recursive:
            return moved
        if self.kt:
            return state
        actions = (rule.replace.prefill, rule.replace.generate)
        places = any(action.device is not None or runs_on_host(action.op) for action in actions)
        return moved if places else state

    def phase(self, rule: Rule, action: PhaseAction, facts: ModuleFacts, device: str) -> PhasePlacement:
        """One phase of a rule on one module; ``device`` is what the module gets without the rule."""
        op = action.op
        if not fits(op, facts.role, isinstance(facts.module, nn.Linear)):
            if rule.replace.fallback != "aten":
                raise self.wrong_family(rule, str(op), facts)
            self.note(
                "fallback",
                f"{op} cannot take {facts.path!r}, which is {_a(facts.role)}: it runs as aten, by `fallback: aten`",
                rule.origin,
                rule.label,
            )
            op = "aten"
        if action.device is not None:
            device = action.device
        elif runs_on_host(op):
            device = self.host()
        if op is None and action.weights not in (None, "model"):
            op = self.op_for_format(rule, str(action.weights), facts, device)
        if runs_on_host(op) and not is_host(device, self.ruleset.devices):
            raise PlacementError(
                f"{action.kt_op or op} runs on the host, but the rule puts it on {device!r}",
                origin=rule.origin,
                rule=rule.label,
                module=facts.path,
                expected="a device that stands for cpu",
                mend=f"use device: {self.host()}, or an op for GPUs such as {family(op)}.triton",
            )
        return PhasePlacement(device, op, action.weights)

    def op_for_format(self, rule: Rule, weights: str, facts: ModuleFacts, device: str) -> str | None:
        """A rule that names a format and no op means the kernel of the device."""
        kernel = "cpu" if is_host(device, self.ruleset.devices) else "triton"
        for name in (f"experts.{kernel}", f"linear.{kernel}"):
            if fits(name, facts.role, isinstance(facts.module, nn.Linear)):
                return name
        self.note(
            "inert",
            f"weights: {weights} has no effect on {facts.path!r}, which is {_a(facts.role)}: formats are for experts "
            "and linear layers, and are not inherited",
            rule.origin,
            rule.label,
        )
        return None

    def host(self) -> str:
        """The name of the host: the first of ``devices:`` that stands for cpu, else ``cpu``."""
        return next((name for name, real in self.ruleset.devices.items() if real == "cpu"), "cpu")

    def wrong_family(self, rule: Rule, op: str, facts: ModuleFacts) -> PlacementError:
        wanted = " or ".join(roles_for(op))
        named = next((a.kt_op for a in (rule.replace.generate, rule.replace.prefill) if a.op == op and a.kt_op), op)
        if facts.role in ("moe", "layer") and family(op) == "experts":
            mend = "match the experts inside it: module: experts, or end the name with \\.experts$"
        elif rule.match.name is not None and not rule.match.name.endswith("$"):
            mend = "the name is searched anywhere in the path: end it with $ so that it hits one module a layer"
        else:
            mend = f"use an op for {facts.role or 'any module'}" + (
                f", such as {facts.role}.aten" if facts.role in ("experts", "linear") else ", such as aten"
            )
        return PlacementError(
            f"{named} cannot take this module, which is {_a(facts.role)} ({type(facts.module).__name__})",
            origin=rule.origin,
            rule=rule.label,
            module=facts.path,
            expected=f"a module of role {wanted}",
            mend=mend + "; or add fallback: aten" * (rule.replace.kt_class is None),
        )

    def kt_notes(self, rule: Rule) -> None:
        kwargs = rule.replace.kt_kwargs
        if kwargs.get("n_deferred_experts"):
            self.note("inert", "n_deferred_experts has no effect here: no expert is deferred", rule.origin, rule.label)
        name = str(rule.replace.kt_class).rpartition(".")[2]
        ops = [action.op for action in (rule.replace.prefill, rule.replace.generate) if action.op not in (None, "none")]
        if not ops and name in ("KTransformersLinear", "KTransformersExperts", "KTransformersExpertsV2"):
            implied = "KLinearMarlin (int4)" if name == "KTransformersLinear" else "KExpertsCPU"
            self.note(
                "no-operator",
                f"the rule names no operator; KTransformers would take {implied}, ktfx keeps the model's own "
                "arithmetic: add generate_op",
                rule.origin,
                rule.label,
            )


def _other_phase(action: PhaseAction, other: PhaseAction) -> PhaseAction:
    """A phase for which a KTransformers rule says nothing, or the operator "None", is run as the other one."""
    if action.op == "none" or (action.op is None and action.device is None):
        if other.op == "none":
            return replace(action, op=None, device=action.device or other.device)
        return other if other.device or other.op else action
    if action.device is None and other.device is not None and not runs_on_host(action.op):
        return replace(action, device=other.device)
    return action


def ranges_text(numbers: list[int]) -> str:
    """Sorted numbers as ranges: layers 3, 7-9."""
    parts: list[str] = []
    start = previous = numbers[0]
    for number in [*numbers[1:], None]:
        if number is not None and number == previous + 1:
            previous = number
            continue
        parts.append(f"{start}-{previous}" if previous > start else str(start))
        if number is not None:
            start = previous = number
    return ("layer " if len(numbers) == 1 else "layers ") + ", ".join(parts)


def _a(role: str | None) -> str:
    if role is None:
        return "of no role that ops know"
    return f"an {role} module" if role[0] in "aeio" else f"a {role} module"
