"""Why a rule did not apply: each rule's conditions against a module, in the order they are tried, both sides shown."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from ktfx.errors import OptionError
from ktfx.graph import info
from ktfx.lint import facts_of
from ktfx.resolve import ModuleFacts, Resolution, class_matches, name_matches, rule_matches
from ktfx.ruleset import Rule, Ruleset
from ktfx.text import near


@dataclass(frozen=True)
class Condition:
    """One thing that ``match`` asks. wanted, found: what the rule says and what the module is."""

    what: str
    wanted: str
    found: str
    holds: bool


@dataclass(frozen=True)
class Tried:
    """One rule at one module.

    outcome: ``applies``; ``fails`` (see failed); ``shadowed``: it would match, but ``by`` was first; ``kept out`` by
    the ``recursive: false`` of the rule ``by`` around it.
    """

    rule: str
    place: str
    module: str
    outcome: str
    conditions: tuple[Condition, ...]
    by: str | None = None

    @property
    def failed(self) -> Condition | None:
        """The first condition that does not hold."""
        return next((c for c in self.conditions if not c.holds), None)

    def text(self) -> str:
        if self.outcome == "applies":
            return "applies"
        if self.failed is not None:
            return f"{self.failed.what}: the rule asks for {self.failed.wanted}, here it is {self.failed.found}"
        return f"would match, but {self.by} " + ("keeps rules out" if self.outcome == "kept out" else "takes it first")


def conditions(rule: Rule, facts: ModuleFacts) -> tuple[Condition, ...]:
    """What the rule asks, in the order it is checked; the last one checked is the first that fails."""
    match, where = rule.match, rule.match.where
    found: list[Condition] = []

    def ask(what: str, wanted: Any, have: Any, holds: bool) -> None:
        found.append(Condition(what, str(wanted), str(have), holds))

    if match.module is not None:
        ask("module (role)", match.module, facts.role or "none", match.module == facts.role)
    if match.layers is not None:
        layers = ", ".join(map(str, sorted(match.layers)))
        ask("layers", layers, "outside the layers" if facts.layer is None else facts.layer, facts.layer in match.layers)
    if match.name is not None:
        have = facts.path + (f" (formerly {facts.old_path})" if facts.old_path else "")
        ask("name", match.name + _matched_part(match.name, facts.path), have, name_matches(match.name, facts))
    if match.cls is not None:
        kind: Any = type(facts.module)
        ask("class", match.cls, f"{kind.__module__}.{kind.__qualname__}", class_matches(match.cls, kind, facts.role))
    if where is not None:
        if where.dtype is not None:
            first = next((p for p in facts.module.parameters() if p.is_floating_point()), None)
            dtype = str(first.dtype).removeprefix("torch.") if first is not None else "no floating parameter"
            ask("where.dtype", where.dtype, dtype, dtype == where.dtype)
        if where.device is not None:
            devices = (*facts.devices, *(w.split(":")[0] for w in facts.written))
            ask("where.device", where.device, " / ".join(dict.fromkeys(facts.devices)), where.device in devices)
        own = dict(facts.module.named_parameters(recurse=False))
        for name, sizes in (where.shapes or {}).items():
            wanted = "[" + ", ".join("_" if s is None else str(s) for s in sizes) + "]"
            if name not in own:
                ask(f"where.shapes.{name}", wanted, "no such parameter" + near(name, own), False)
            else:
                shape = tuple(own[name].shape)
                same = len(shape) == len(sizes) and all(w in (None, s) for w, s in zip(sizes, shape, strict=True))
                ask(f"where.shapes.{name}", wanted, list(shape), same)
    return tuple(found)


def _matched_part(pattern: str, path: str) -> str:
    """How far a regular expression gets: the longest prefix of it that still matches, where that is not all."""
    if re.search(pattern, path):
        return ""
    for end in range(len(pattern) - 1, 0, -1):
        try:
            found = re.search(pattern[:end], path)
        except re.error:
            continue
        if found and found[0]:
            return f" (up to '{pattern[:end]}' it matches '{found[0]}')"
    return ""


def tried_rules(ruleset: Ruleset, resolution: Resolution, model: nn.Module, module: str) -> list[Tried]:
    """Every module rule at one module, in the order they are tried."""
    facts = _facts_of(ruleset, resolution, model, module)
    placement = resolution.placements[module]
    winner = placement.rule
    rows = []
    for rule in ruleset.module_rules:
        asked = conditions(rule, facts)
        by = None
        if winner is rule:
            outcome = "applies"
        elif not all(c.holds for c in asked) or not rule_matches(rule, facts):
            outcome = "fails"
        elif winner is not None:
            outcome, by = "shadowed", winner.label
        else:
            holder = resolution.placements.get(placement.inherited_from or "")
            outcome, by = "kept out", holder.rule.label if holder is not None and holder.rule is not None else None
        rows.append(Tried(rule.label, str(rule.origin), module, outcome, asked, by))
    return rows


def why_rule(
    ruleset: Ruleset, resolution: Resolution, model: nn.Module, rule: Rule, module: str | None
) -> tuple[Tried, int]:
    """One rule at a module, or at its nearest candidate; and how many modules it applies to.

    Nearest is the module at which most conditions hold, and among those the one whose path is most like the name.
    """
    applied = [p for p, placement in resolution.placements.items() if placement.rule is rule]
    target = module if module is not None else (applied[0] if applied else _nearest(ruleset, resolution, model, rule))
    row = next(t for t in tried_rules(ruleset, resolution, model, target) if t.rule == rule.label)
    return row, len(applied)


def _nearest(ruleset: Ruleset, resolution: Resolution, model: nn.Module, rule: Rule) -> str:
    plain = re.sub(r"\\(.)", r"\1", rule.match.name or rule.match.cls or "").strip("^$")

    def score(path: str) -> tuple[int, float]:
        facts = _facts_of(ruleset, resolution, model, path)
        # What the module is says more than where it lies or how wide it is.
        held = sum((1 if c.what.startswith("where") else 2) for c in conditions(rule, facts) if c.holds)
        return held, difflib.SequenceMatcher(None, plain, path, autojunk=False).ratio()

    return max(resolution.placements, key=score)


def _facts_of(ruleset: Ruleset, resolution: Resolution, model: nn.Module, module: str) -> ModuleFacts:
    placement = resolution.placements.get(module)
    if placement is None:
        raise OptionError(
            f"the model has no module {module!r}{near(module, resolution.placements)}",
            expected="a dotted module path, as `ktfx resolve` prints them",
        )
    return facts_of(placement, ruleset, model)


def find_rule(ruleset: Ruleset, text: str) -> Rule:
    """A rule by its number or label: ``3`` or ``rule 3``."""
    number = text.lower().removeprefix("rule").strip()
    for rule in ruleset.rules:
        if number == str(rule.number):
            return rule
    raise OptionError(
        f"the file has no rule {text!r}", expected=f"a number from 1 to {len(ruleset.rules)}, or a pattern"
    )


# ---- patterns


@dataclass(frozen=True)
class PatternAnswer:
    """matches: where it holds. nearest: lines that show pattern and graph at the nearest candidate."""

    pattern: str
    matches: tuple[str, ...]
    nearest: tuple[str, ...]
    kind: str | None


def why_pattern(graph: fx.Graph, pattern: Any, module: str | None = None) -> PatternAnswer:
    """Where a pattern matches; if nowhere, the nearest candidate and the first thing that failed there."""
    from ktfx.matcher import Failure, Match, Matcher, explain_match, nearest, text_of

    matcher = Matcher.of(pattern)
    nodes = [n for n in graph.nodes if module is None or _inside(info(n).module, module)]
    if module is not None and not nodes:
        modules = {info(n).module for n in graph.nodes}
        raise OptionError(f"no node of the graph lies in {module!r}{near(module, modules)}")
    found = tuple(root.name for root in matcher.candidates(nodes) if isinstance(matcher.match(root), Match))
    best = nearest(matcher, nodes)
    lines: Sequence[str] = (
        explain_match(graph, matcher.pattern, best.root)
        if best is not None
        else ("no node of the graph has the pattern's outermost operator",)
    )
    kind = best.kind if isinstance(best, Failure) else None
    return PatternAnswer(text_of(matcher.pattern), found, tuple(lines), kind)


def _inside(path: str, module: str) -> bool:
    return path == module or path.startswith(module + ".") or module == ""
