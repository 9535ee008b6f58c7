"""What is wrong, or likely wrong, with a rule file: by itself, and against a model's module tree, without weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ktfx import kt_compat
from ktfx.devices import is_host, written_device
from ktfx.errors import KtfxError, Origin, PlacementError, RuleError
from ktfx.experts_requests import requested_spec
from ktfx.linear_rules import linear_choice, why_not
from ktfx.op_names import family, runs_on_host
from ktfx.ops import load_ops
from ktfx.ops.experts import experts_kernel, experts_kernel_names
from ktfx.ops.experts_layout import experts_layout
from ktfx.resolve import ModuleFacts, ModulePlacement, Resolution, name_matches, resolve, rule_matches
from ktfx.rule_parser import parse_rules
from ktfx.ruleset import Rule, Ruleset, read_source
from ktfx.text import did_you_mean

CODES = {
    "invalid": "the file, or a rule in it, cannot be read",
    "cannot-hold": "a rule cannot hold for this model",
    "layout": "an op cannot take the layout of the model's experts, or a linear layer",
    "matches-nothing": "a rule matches no module of this model",
    "shadowed": "every module that a rule matches is taken by earlier rules",
    "unanchored": "a regular expression stops inside a number: layers.1 also matches layer 10",
    "unused-device": "a device is declared and never named",
    "unknown-pass": "a pass that is not registered",
    "dead-layers": "a range of `layers:` lies past the last layer",
    "layers-past-end": "a range of `layers:` reaches past the last layer",
    "layer-gap": "`layers:` leaves layers out",
    "transfer-map-unused": "the rule with the transfer_map places no module",
    "transfer-map-twice": "a second transfer_map is not used",
    "fallback": "an op is replaced by aten, as the rule allows",
    "inert": "a setting without effect",
    "no-operator": "a KTransformers class without an operator",
}
"""Every code a finding may have, and what it means."""


@dataclass(frozen=True)
class Finding:
    """severity: ``error`` (the file cannot be used, or not with this model) or ``warning``. code: of ``CODES``."""

    severity: str
    code: str
    message: str
    origin: Origin
    rule: str | None = None
    mend: str | None = None
    module: str | None = None

    def __str__(self) -> str:
        where = f"{self.origin}: {self.severity} [{self.code}] " + (f"{self.rule}: " if self.rule else "")
        return where + self.message + (f"\n  mend: {self.mend}" if self.mend else "")


def lint(
    source: Ruleset | str | Path | Mapping[str, Any] | Sequence[Any], model: nn.Module | None = None
) -> list[Finding]:
    """All findings, in the order of the file: errors, what is suspicious, and, with a model, what does not fit it.

    source: a ruleset, or what ``load_ruleset`` takes. model: may be on the meta device. Raises nothing for a bad file.
    """
    errors: list[RuleError] = []
    try:
        ruleset = source if isinstance(source, Ruleset) else parse_rules(read_source(source), errors)
    except RuleError as error:
        return [_from_error(error, "invalid")]
    found = [_from_error(error, "invalid") for error in errors]
    found += _unused_devices(ruleset) if not errors else []
    found += _unknown_passes(ruleset)
    found += _second_transfer_map(ruleset)
    if model is None:
        found += _unanchored(ruleset, _sample_paths())
        found += _same_match(ruleset)
    else:
        found += _against(ruleset, model)
    return sorted(found, key=lambda f: (f.origin.line, f.origin.column))


# ---- the file by itself


def _from_error(error: KtfxError, code: str) -> Finding:
    message = error.what + (f" (expected: {error.expected})" if error.expected else "")
    if error.module is not None:
        message = f"module {error.module!r}: {message}"
    return Finding("error", code, message, error.origin or Origin("<rules>"), error.rule, error.mend, error.module)


def _unused_devices(ruleset: Ruleset) -> list[Finding]:
    implied_host = any(
        action.device is None and runs_on_host(action.op)
        for rule in ruleset.rules
        for action in (rule.replace.prefill, rule.replace.generate)
    )
    first_host = next((name for name in ruleset.devices if is_host(name, ruleset.devices)), None)
    found = []
    for name in ruleset.devices:
        if name in ruleset.device_origins or (implied_host and name == first_host):
            continue
        found.append(
            Finding(
                "warning",
                "unused-device",
                f"no rule and no layer range names the device {name!r} ({ruleset.devices[name]})",
                ruleset.origin,
                mend=f"use {name!r}, or remove it from `devices:`",
            )
        )
    return found


def _unknown_passes(ruleset: Ruleset) -> list[Finding]:
    if not ruleset.passes:
        return []
    from ktfx.pass_manager import build_pipeline, registered_passes

    known = registered_passes()
    found = []
    for request in ruleset.passes:
        if request.name not in known:
            what = f"no pass named {request.name!r}"
            mend = did_you_mean(request.name, known) or "name one of " + ", ".join(sorted(known))
            found.append(Finding("error", "unknown-pass", what, request.origin, mend=mend))
            continue
        try:
            build_pipeline([request])
        except RuleError as error:
            found.append(Finding("error", "invalid", error.what, request.origin, mend=f"use {error.expected}"))
    return found


def _second_transfer_map(ruleset: Ruleset) -> list[Finding]:
    owners = [rule for rule in ruleset.rules if "transfer_map" in rule.replace.kt_kwargs]
    return [
        Finding(
            "warning",
            "transfer-map-twice",
            f"{owners[0].label} (line {owners[0].origin.line}) has a transfer_map already; this one is not used",
            rule.origin,
            rule.label,
            "keep one transfer_map",
        )
        for rule in owners[1:]
    ]


def _sample_paths() -> list[str]:
    """Paths as most models have them, for the one check of a regular expression that makes sense without a model."""
    inner = ("", ".self_attn", ".self_attn.q_proj", ".mlp", ".mlp.experts", ".mlp.gate", ".input_layernorm")
    return [f"{stem}.{i}{tail}" for stem in ("model.layers", "transformer.h") for i in range(100) for tail in inner]


def _unanchored(ruleset: Ruleset, paths: Sequence[str]) -> list[Finding]:
    found = []
    for rule in ruleset.rules:
        cut = next((c for path in paths if (c := _cut_number(rule, path)) is not None), None)
        if cut is not None:
            found.append(
                Finding(
                    "warning",
                    "unanchored",
                    f"the name {rule.match.name!r} also matches {cut!r}: it stops inside a number",
                    rule.name_origin or rule.origin,
                    rule.label,
                    "follow the number by \\. or $, and begin with ^; or use `layers:` in `match:`",
                    cut,
                )
            )
    return found


def _cut_number(rule: Rule, path: str) -> str | None:
    """The path, if the regular expression matches it in a way that begins or ends between two digits."""
    if rule.match.name is None:
        return None
    match = re.search(rule.match.name, path)
    if match is None or match.start() == match.end():
        return None
    start, end = match.span()
    cut_end = end < len(path) and path[end - 1].isdigit() and path[end].isdigit()
    cut_start = start > 0 and path[start].isdigit() and path[start - 1].isdigit()
    return path if cut_end or cut_start else None


def _same_match(ruleset: Ruleset) -> list[Finding]:
    found = []
    for index, rule in enumerate(ruleset.module_rules):
        earlier = next((r for r in ruleset.module_rules[:index] if r.match == rule.match), None)
        if earlier is not None:
            found.append(_shadowed(rule, [earlier], "it matches exactly what that one does"))
    return found


def _shadowed(rule: Rule, by: Sequence[Rule], why: str) -> Finding:
    names = ", ".join(f"{r.label} (line {r.origin.line})" for r in by[:4]) + (" and others" if len(by) > 4 else "")
    return Finding(
        "warning",
        "shadowed",
        f"the rule is never used: {names} comes first, and {why}",
        rule.origin,
        rule.label,
        f"move it above {by[0].label}, or remove it",
    )


# ---- the file against a model


def _against(ruleset: Ruleset, model: nn.Module) -> list[Finding]:
    """What needs the module tree. A rule that cannot hold is reported and left out, so that the rest is seen."""
    load_ops()
    found: list[Finding] = []
    current = ruleset
    while True:
        try:
            resolution = resolve(current, model)
            break
        except PlacementError as error:
            found.append(_from_error(error, "cannot-hold"))
            rest = tuple(rule for rule in current.rules if rule.label != error.rule)
            if len(rest) == len(current.rules):
                return found
            current = replace(current, rules=rest)
            if not any("transfer_map" in rule.replace.kt_kwargs for rule in rest):
                current = replace(current, transfer_map={})
    found += [Finding("warning", n.code, n.message, n.origin, n.rule) for n in resolution.notes]
    found += _unanchored(ruleset, list(resolution.placements))
    found += _useless_rules(current, resolution, model)
    found += _layouts(resolution, model)
    return found


def facts_of(placement: ModulePlacement, ruleset: Ruleset, model: nn.Module) -> ModuleFacts:
    """What the rules can ask about one placed module of ``model`` (which may be on the meta device)."""
    old = kt_compat.old_path(placement.module, kt_compat.family_of_model(model))
    return ModuleFacts(
        placement.module,
        model.get_submodule(placement.module),
        placement.role,
        placement.layer,
        old if ruleset.dialect == "ktransformers" else None,
        (placement.prefill.device, placement.generate.device),
        tuple(written_device(p.device, ruleset.devices) for p in (placement.prefill, placement.generate)),
    )


def _useless_rules(ruleset: Ruleset, resolution: Resolution, model: nn.Module) -> list[Finding]:
    facts = [facts_of(p, ruleset, model) for p in resolution.placements.values()]
    used = {p.rule.number for p in resolution.placements.values() if p.rule is not None}
    found = []
    for rule in ruleset.module_rules:
        if rule.number in used:
            continue
        matched = [f.path for f in facts if rule_matches(rule, f)]
        if not matched:
            found.append(_matches_nothing(rule, facts))
            continue
        by = {p.rule.number: p.rule for path in matched if (p := resolution.placements[path]).rule is not None}
        if by:
            count = "the one module" if len(matched) == 1 else f"all {len(matched)} modules"
            found.append(_shadowed(rule, [by[n] for n in sorted(by)], f"takes {count} that this one matches"))
        else:
            holder = resolution.placements[matched[0]].inherited_from
            by_rule = resolution.placements[holder].rule if holder is not None else None
            found.append(
                _shadowed(rule, [by_rule], "`recursive: false` keeps rules out of it")
                if by_rule
                else _matches_nothing(rule, facts)
            )
    return found


def _matches_nothing(rule: Rule, facts: Sequence[ModuleFacts]) -> Finding:
    match = rule.match
    by_class = replace(rule, match=replace(match, name=None))
    message, mend = "the rule matches no module of this model", "check the name against `ktfx resolve`"
    if match.name is not None:
        named = [f for f in facts if name_matches(match.name, f)]
        if not named:
            message += f": no path matches {match.name!r}"
        elif match.cls is not None:
            kinds = sorted({type(f.module).__name__ for f in named})
            message += f": the name matches {len(named)}, of class {', '.join(kinds[:4])}, none is a {match.cls}"
            mend = did_you_mean(match.cls.rpartition(".")[2], kinds) or "drop `class:`, or name the model's own class"
            elsewhere = [f.path for f in facts if rule_matches(by_class, f)]
            if elsewhere:
                mend = f"in this model it stands at {elsewhere[0]!r}: name that, or remove the rule"
    elif match.cls is not None:
        kinds = sorted({type(f.module).__name__ for f in facts})
        message += f": none is a {match.cls}"
        mend = did_you_mean(match.cls.rpartition(".")[2], kinds) or mend
    elif match.module is not None:
        roles = sorted({f.role for f in facts if f.role})
        message += f": none has the role {match.module!r}"
        mend = "the model has the roles " + ", ".join(roles)
    origin = rule.name_origin or rule.origin
    return Finding("warning", "matches-nothing", message, origin, rule.label, mend)


def _layouts(resolution: Resolution, model: nn.Module) -> list[Finding]:
    """Experts and linear ops on layers that they cannot take: one finding a rule, op and reason."""
    seen: dict[tuple[int, str, str], list[str]] = {}
    rules: dict[int, Rule] = {}
    for placement in resolution.placements.values():
        for place, phase in ((placement.prefill, "prefill"), (placement.generate, "generate")):
            if placement.rule is None:
                continue
            if family(place.op) == "experts":
                why = _why_not(resolution, model, placement, phase)
            else:
                why = _why_no_linear(resolution, model, placement, phase)
            if why is not None:
                rules[placement.rule.number] = placement.rule
                paths = seen.setdefault((placement.rule.number, str(place.op), why), [])
                if placement.module not in paths:
                    paths.append(placement.module)
    found = []
    for (number, op, why), paths in seen.items():
        rule = rules[number]
        falls_back = rule.generic or rule.replace.fallback == "aten"
        others = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        found.append(
            Finding(
                "warning" if falls_back else "error",
                "layout",
                f"{op} cannot take {paths[0]!r}{others}: {why}" + ("; aten runs it instead" if falls_back else ""),
                rule.origin,
                rule.label,
                f"use {family(op) or 'linear'}.aten" + ("" if falls_back else ", or add fallback: aten"),
                paths[0],
            )
        )
    return found


def _why_not(resolution: Resolution, model: nn.Module, placement: ModulePlacement, phase: str) -> str | None:
    place = placement.at(phase)
    module = model.get_submodule(placement.module)
    layout = experts_layout(module)
    if isinstance(layout, str):
        return layout
    kernel = str(place.op).split(".", 1)[1]
    if kernel == "aten":
        return None
    if kernel not in experts_kernel_names():
        return f"no kernel {place.op} is registered in this installation"
    spec = requested_spec(layout, placement, phase)
    return experts_kernel(kernel).unsupported(spec, layout.dtype, _real(place.device, resolution.ruleset))


def _why_no_linear(resolution: Resolution, model: nn.Module, placement: ModulePlacement, phase: str) -> str | None:
    choice = linear_choice(model.get_submodule(placement.module), placement, phase)
    if choice is None:
        return None
    device = placement.at(phase).device
    return why_not(choice, device, _real(device, resolution.ruleset), resolution.ruleset.devices)


def _real(name: str, ruleset: Ruleset) -> torch.device:
    return torch.device(written_device(name, ruleset.devices))
