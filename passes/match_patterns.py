"""match_patterns: the subgraph patterns of a rule file → the operators that their rules name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import fx

from ktfx import kt_compat
from ktfx.canonical import tensor_of
from ktfx.errors import RuleError
from ktfx.fusion import device_name, is_on, spans_devices
from ktfx.graph import info, op_name
from ktfx.matcher import Failure, Match, Matcher, check_operators, shown, text_of
from ktfx.pass_manager import Pass, PassContext, Rewrite, register_pass
from ktfx.patterns import operators
from ktfx.replacement import Refusal, Replacement, insertion_point
from ktfx.resolve import ModuleFacts, class_matches, name_matches
from ktfx.ruleset import Rule, Ruleset


@dataclass
class Tally:
    """What one rule came to in one graph: the near misses by module, and the nearest of all."""

    rewritten: int = 0
    stopped: int = 0
    misses: dict[str, Failure] = field(default_factory=dict)
    outside: int = 0

    def note(self, failure: Failure) -> None:
        module = info(failure.root).module
        held = self.misses.get(module)
        if held is None or failure.matched > held.matched:
            self.misses[module] = failure


@register_pass
class MatchPatterns(Pass):
    """Rules in the order of the file; a rule sees what the rules before it made, and never its own results.

    Within a rule the first match in the graph's order takes its nodes. ``name``, ``class``, ``module`` and ``layers``
    hold if one module around the outermost operator has them all; ``where.device`` is where that module is placed.
    A match that spans two devices is left alone.
    """

    name = "match_patterns"
    # What a rule writes is the user's word; verify compares it all the same.
    numerics_preserving = True

    def run(self, gm: fx.GraphModule, context: PassContext) -> None:
        rules = context.resolution.ruleset.pattern_rules
        if not rules:
            return
        check_pattern_rules(context.resolution.ruleset)
        scope = _Scope(context)
        rewritten = 0
        for rule in rules:
            where = rule.match.where
            if where is not None and where.phase is not None and where.phase != context.phase:
                continue
            rewritten += self._apply(gm, context, rule, scope)
        if rewritten:
            gm.graph.eliminate_dead_code()
            gm.recompile()

    def _apply(self, gm: fx.GraphModule, context: PassContext, rule: Rule, scope: _Scope) -> int:
        assert rule.pattern is not None and rule.with_ is not None
        matcher = Matcher(rule.pattern, rule.origin, rule.label)
        replacement = Replacement(rule.with_, rule.origin, rule.label)
        tally = Tally()
        own: set[fx.Node] = set()
        for root in matcher.candidates(list(gm.graph.nodes)):
            if root._erased:
                continue
            if not scope.holds(rule, root):
                tally.outside += 1
                continue
            result = matcher.match(root)
            if isinstance(result, Match) and not own.isdisjoint(result.nodes):
                continue
            if isinstance(result, Match):
                failed = scope.conditions(rule, result) or _refusal(gm.graph, replacement, result)
                result = Failure(root, "where", failed, matcher.size + 1) if failed else result
            if isinstance(result, Failure):
                tally.note(result)
                continue
            module = info(root).module
            if not context.allows(f"match_patterns {rule.label}", module):
                tally.stopped += 1
                continue
            own.update(self._replace(gm.graph, context, rule, matcher, replacement, result))
            tally.rewritten += 1
        self._report(context, rule, matcher, tally)
        return tally.rewritten

    @staticmethod
    def _replace(
        graph: fx.Graph, context: PassContext, rule: Rule, matcher: Matcher, replacement: Replacement, match: Match
    ) -> list[fx.Node]:
        before = tuple(op_name(n) for n in match.nodes)
        names = tuple(n.name for n in match.nodes)
        module = info(match.root).module
        made = replacement.apply(graph, match)
        matcher.forget((*match.nodes, *made))
        context.record(
            Rewrite(
                what=f"{text_of(matcher.pattern)} → {text_of(replacement.expression)}",
                module=module,
                rule=rule.label,
                origin=rule.origin,
                before=before,
                after=tuple(op_name(n) for n in made),
                nodes_before=names,
                nodes_after=tuple(n.name for n in made),
            )
        )
        return made

    @staticmethod
    def _report(context: PassContext, rule: Rule, matcher: Matcher, tally: Tally) -> None:
        """Near misses (two operators or more, or all, had matched); if nothing matched, the nearest, as a warning."""
        near_misses = [f for f in tally.misses.values() if f.matched > 1 or matcher.size == 1]
        for failure in near_misses:
            context.miss(info(failure.root).module, _miss_text(failure, matcher), rule.label)
        if tally.rewritten or tally.stopped:
            return
        nearest = max(tally.misses.values(), key=matcher.nearness, default=None)
        if nearest is not None:
            module = info(nearest.root).module
            why = f"nearest at {shown(nearest.root)} in {module!r}: {nearest.text}"
            if nearest not in near_misses:
                context.miss(module, _miss_text(nearest, matcher), rule.label)
        else:
            root = next(iter(operators(matcher.pattern)))
            why = f"no node is a {root}" + (" in the modules that the rule names" if tally.outside else "")
            context.miss("", why, rule.label)
        context.warn(f"{rule.origin}: {rule.label}: the pattern matches nothing in the {context.phase} graph: {why}")


def check_pattern_rules(ruleset: Ruleset) -> None:
    """RuleError for the first pattern rule that names an operator that there is not, or writes one wrongly."""
    for rule in ruleset.pattern_rules:
        for expression in (rule.pattern, rule.with_):
            assert expression is not None
            check_operators(expression, rule.origin, rule.label)
        assert rule.pattern is not None and rule.with_ is not None
        count = len(Replacement(rule.with_).outputs)
        wanted = len(Replacement(rule.pattern).outputs)
        if count != wanted:
            raise RuleError(
                f"the pattern has {wanted} output{'s' * (wanted > 1)} and `replace.with` has {count}",
                origin=rule.origin,
                rule=rule.label,
                expected="the same number",
                mend="write both as lists: pattern: '[a, b]', with: '[c, d]'",
            )


def _refusal(graph: fx.Graph, replacement: Replacement, match: Match) -> str | None:
    point = insertion_point(graph, match)
    found = point if isinstance(point, Refusal) else replacement.refusal(match)
    return found.text if found is not None else None


def _miss_text(failure: Failure, matcher: Matcher) -> str:
    total = matcher.size
    return f"{failure.root.name}: {failure.text} ({min(failure.matched, total)} of {total} operators matched)"


class _Scope:
    """What a rule asks of the modules and devices around a match."""

    def __init__(self, context: PassContext) -> None:
        self.context = context
        self.placements = context.resolution.placements
        self.ruleset = context.resolution.ruleset
        self.modules = dict(context.captured.model.named_modules(remove_duplicate=False))
        self.family = kt_compat.family_of_model(context.captured.model)
        self._held: dict[tuple[int, str], bool] = {}

    def holds(self, rule: Rule, root: fx.Node) -> bool:
        """Whether one module around the node has all that ``match`` names."""
        path = info(root).module
        key = (rule.number, path)
        if key not in self._held:
            self._held[key] = self._holds(rule, path)
        return self._held[key]

    def _holds(self, rule: Rule, path: str) -> bool:
        match = rule.match
        if match.layers is not None and self.context.resolution.of(path).layer not in match.layers:
            return False
        if match.name is None and match.cls is None and match.module is None:
            return True
        return any(self._module_holds(rule, facts) for facts in self._around(path))

    @staticmethod
    def _module_holds(rule: Rule, facts: ModuleFacts) -> bool:
        match = rule.match
        if match.module is not None and match.module != facts.role:
            return False
        if match.name is not None and not name_matches(match.name, facts):
            return False
        return match.cls is None or class_matches(match.cls, type(facts.module), facts.role)  # type: ignore[arg-type]

    def _around(self, path: str) -> Iterator[ModuleFacts]:
        """The module and its ancestors, innermost first."""
        while True:
            placement, module = self.placements.get(path), self.modules.get(path)
            if placement is not None and module is not None:
                old = kt_compat.old_path(path, self.family) if self.ruleset.dialect == "ktransformers" else None
                yield ModuleFacts(path, module, placement.role, placement.layer, old)
            if not path:
                return
            path = path.rpartition(".")[0]

    def conditions(self, rule: Rule, match: Match) -> str | None:
        """The first of ``where`` that does not hold, in words; also a match that lies on two devices."""
        where = rule.match.where
        device = device_name(match.root, self.context)
        if where is not None:
            val = tensor_of(match.root)
            dtype = str(val.dtype).removeprefix("torch.") if val is not None else "no tensor"
            if where.dtype is not None and where.dtype != dtype:
                return f"where.dtype: the rule asks for {where.dtype}, {match.root.name} is {dtype}"
            if where.device is not None and not is_on(where.device, device, self.ruleset):
                return f"where.device: the rule asks for {where.device}, {match.root.name} runs on {device}"
            for name, sizes in (where.shapes or {}).items():
                failed = _shape_differs(name, match.captures[name], sizes)
                if failed is not None:
                    return failed
        return spans_devices(match.nodes, match.root, self.context)


def _shape_differs(name: str, value: object, sizes: tuple[int | None, ...]) -> str | None:
    val = tensor_of(value)
    if val is None:
        return f"where.shapes: {name} is no tensor"
    if len(val.shape) != len(sizes) or any(w is not None and w != s for w, s in zip(sizes, val.shape, strict=False)):
        wanted = ["any" if s is None else s for s in sizes]
        return f"where.shapes: the rule asks for {name} {wanted}, it is {[str(s) for s in val.shape]}"
    return None
