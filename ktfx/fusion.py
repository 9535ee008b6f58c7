"""Passes that put one kernel in place of a known subgraph: norms, rope, gated activations, routers.

Each is a list of ``Fusion``s: a canonical pattern, what to write for it, and what must hold besides. Where the role of
a module says that the subgraph should be there and it is not, the nearest miss is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx

from ktfx.devices import canonical, written_device
from ktfx.errors import PassError
from ktfx.graph import info, is_tensor_node, op_name
from ktfx.matcher import Failure, Match, Matcher
from ktfx.pass_manager import Pass, PassContext, Rewrite
from ktfx.patterns import parse_pattern
from ktfx.replacement import Refusal, Replacement, insertion_point
from ktfx.ruleset import Ruleset
from ktfx.text import near


def device_name(node: fx.Node, context: PassContext) -> str:
    """The name of the device that ``assign_devices`` will give the node."""
    return context.resolution.glue_device(info(node).module, context.phase)


@dataclass(frozen=True)
class OnDevice(Pass.Options):
    """device: where: a kind (``cuda``, ``cpu``), a device name, or ``any``."""

    device: str = "cuda"


def is_on(asked: str, name: str, ruleset: Ruleset) -> bool:
    """Whether a device name is what ``asked`` means: itself, or its kind (``cuda``, ``cpu``).

    The kind is as the rule file writes it: simulation does not change it.
    """
    written = written_device(name, ruleset.devices)
    return asked in (name, written.partition(":")[0]) or canonical(asked) == written


def is_meant(device: str, name: str, ruleset: Ruleset) -> bool:
    """Whether a pass whose option ``device`` this is works on a device of that name; ``any``: on every one."""
    return device == "any" or is_on(device, name, ruleset)


def is_asked(device: str, node: fx.Node, context: PassContext) -> bool:
    """Whether a pass whose option ``device`` this is works on the node."""
    return is_meant(device, device_name(node, context), context.resolution.ruleset)


def spans_devices(nodes: Iterable[fx.Node], root: fx.Node, context: PassContext) -> str | None:
    """In words, if not all of the nodes run where ``root`` does; merging them would move work across devices."""
    device = device_name(root, context)
    for node in nodes:
        if is_tensor_node(node) and device_name(node, context) != device:
            return f"it spans two devices: {node.name} runs on {device_name(node, context)}, {root.name} on {device}"
    return None


@dataclass(frozen=True)
class Fusion:
    """One known subgraph.

    pattern, with_: expressions as in a rule file. check: what must hold besides, or why not. tables: makes nodes that
    ``with_`` reads under further names, sharing them between matches through the mapping it is given.
    """

    what: str
    pattern: str
    with_: str
    check: Callable[[Match], str | None] = lambda match: None
    tables: Callable[[fx.Graph, Match, dict[Any, fx.Node]], Mapping[str, Any]] | None = None


@dataclass
class _Seen:
    """What a run has come to: rewritten modules, and the nearest failure in each module."""

    rewritten: set[str] = field(default_factory=set)
    failures: dict[str, Failure] = field(default_factory=dict)

    def note(self, failure: Failure) -> None:
        module = info(failure.root).module
        held = self.failures.get(module)
        if held is None or failure.matched > held.matched:
            self.failures[module] = failure


class FusionPass(Pass):
    """Subclasses set ``fusions`` (tried in order) and ``roles`` (where they are expected).

    ``only_in_roles``: matches outside modules of these roles are left alone.
    """

    roles: ClassVar[tuple[str, ...]] = ()
    fusions: ClassVar[tuple[Fusion, ...]] = ()
    only_in_roles: ClassVar[bool] = False

    @dataclass(frozen=True)
    class Options:
        """device: where to fuse: a kind (``cuda``, ``cpu``), a device name, or ``any``. Elsewhere the compiler's own
        fusion is left to work."""

        device: str = "cuda"

    options: Options

    def chosen(self) -> tuple[Fusion, ...]:
        """The fusions that the options leave on."""
        return self.fusions

    def run(self, gm: fx.GraphModule, context: PassContext) -> None:
        self._check_device(context)
        seen = _Seen()
        readings: dict[fx.Node, Any] = {}
        shared: dict[Any, fx.Node] = {}
        before = len(context.rewrites)
        for fusion in self.chosen():
            self._apply(gm.graph, context, fusion, seen, readings, shared)
        self._report(gm.graph, context, seen)
        if len(context.rewrites) > before:
            gm.graph.eliminate_dead_code()
            gm.recompile()

    def _check_device(self, context: PassContext) -> None:
        asked = self.options.device
        known = ["any", "cuda", "cpu", *context.resolution.ruleset.device_origins, *context.devices]
        if asked not in known and canonical(asked) not in known:
            raise PassError(
                f"pass {self.name!r}: no device {asked!r}{near(asked, known)}",
                expected="any, a kind (cuda, cpu), or a device name of the rules",
                mend=f"write `- {self.name}: {{device: cuda}}`",
            )

    def _apply(
        self,
        graph: fx.Graph,
        context: PassContext,
        fusion: Fusion,
        seen: _Seen,
        readings: dict[fx.Node, Any],
        shared: dict[Any, fx.Node],
    ) -> None:
        matcher = Matcher(parse_pattern(fusion.pattern), readings=readings)
        replacement = Replacement(parse_pattern(fusion.with_))
        for root in matcher.candidates(list(graph.nodes)):
            if root._erased or not self._applies(root, context):
                continue
            result = matcher.match(root)
            if isinstance(result, Match):
                why = self._why_not(graph, context, fusion, replacement, result)
                result = Failure(root, "check", why, matcher.size + 1) if why else result
            if isinstance(result, Failure):
                seen.note(result)
                continue
            module = info(root).module
            if not context.allows(f"{self.name} {fusion.what}", module):
                continue
            self._replace(graph, context, fusion, replacement, matcher, result, shared)
            seen.rewritten.add(module)

    def _applies(self, root: fx.Node, context: PassContext) -> bool:
        if not is_asked(self.options.device, root, context):
            return False
        return not self.only_in_roles or role_module(info(root).module, self.roles, context) is not None

    @staticmethod
    def _why_not(
        graph: fx.Graph, context: PassContext, fusion: Fusion, replacement: Replacement, match: Match
    ) -> str | None:
        why = spans_devices(match.nodes, match.root, context) or fusion.check(match)
        if why is not None:
            return why
        point = insertion_point(graph, match)
        found = point if isinstance(point, Refusal) else None
        if found is None and fusion.tables is None:
            found = replacement.refusal(match)
        return found.text if found is not None else None

    @staticmethod
    def _replace(
        graph: fx.Graph,
        context: PassContext,
        fusion: Fusion,
        replacement: Replacement,
        matcher: Matcher,
        match: Match,
        shared: dict[Any, fx.Node],
    ) -> None:
        before = tuple(op_name(n) for n in match.nodes)
        names = tuple(n.name for n in match.nodes)
        module = info(match.root).module
        if fusion.tables is not None:
            extra = fusion.tables(graph, match, shared)
            match = Match(match.root, match.outputs, {**match.captures, **extra}, match.nodes)
        made = replacement.apply(graph, match)
        matcher.forget((*match.nodes, *made))
        context.record(
            Rewrite(
                what=fusion.what,
                module=module,
                before=before,
                after=tuple(op_name(n) for n in made),
                nodes_before=names,
                nodes_after=tuple(n.name for n in made),
            )
        )

    def _report(self, graph: fx.Graph, context: PassContext, seen: _Seen) -> None:
        """A miss for each innermost module of the roles that has nodes where the pass works and kept them all."""
        expected: dict[str, None] = {}
        for node in graph.nodes:
            if node.op == "call_function" and self._applies(node, context):
                module = role_module(info(node).module, self.roles, context)
                if module is not None:
                    expected[module] = None
        inner = {module.rpartition(".")[0] for module in expected}
        done = {around for path in seen.rewritten for around in _ancestors(path)}
        for module in [m for m in expected if m not in done and m not in inner]:
            inside = [f for path, f in seen.failures.items() if path == module or path.startswith(module + ".")]
            nearest = max(inside, key=lambda f: f.matched, default=None)
            why = f"nearest at {nearest.root.name}: {nearest.text}" if nearest else "nothing in it looks like one"
            context.miss(module, f"{self.name}: {why}")


def _ancestors(path: str) -> list[str]:
    """The path and the modules around it."""
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def role_module(path: str, roles: tuple[str, ...], context: PassContext) -> str | None:
    """The innermost module around ``path`` that has one of the roles."""
    while True:
        placement = context.resolution.placements.get(path)
        if placement is not None and placement.role in roles:
            return path
        if not path:
            return None
        path = path.rpartition(".")[0]
