"""A failing graph made smaller, node by node, as long as it fails in the same way.

Delta debugging: whole blocks first, then ever smaller ones. A node that is cut out becomes an input of the same form
(with the value it had, where the run needs values), and what only it needed goes with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import fx

from ktfx.debug.case import Case, run_case, value_of
from ktfx.debug.failure import Failure
from ktfx.debug.graph_loader import refresh_all
from ktfx.debug.reduce import Attempt, fewer_rules
from ktfx.errors import KtfxError, OptionError
from ktfx.graph import GraphInput, output_node, placeholders
from ktfx.pass_manager import copy_graph

T = TypeVar("T")


@dataclass
class _Search:
    """The smallest case so far, and what tries to make it smaller."""

    case: Case
    failure: Failure
    pattern: re.Pattern[str]
    run: Callable[[Case], Failure | None]
    progress: Callable[[Attempt], None] | None
    attempts: list[Attempt]

    def try_case(self, change: str, candidate: Case | None) -> bool:
        """True, and the candidate is kept, if it fails as it should. None is a candidate that cannot be made."""
        if candidate is None:
            return False
        try:
            failure = self.run(candidate)
            why = "it did not fail" if failure is None else failure.text
        except KtfxError as error:
            failure, why = None, f"{type(error).__name__}: {error.what}"
        kept = failure is not None and self.pattern.search(failure.text) is not None
        attempt = Attempt(f"{change}: {candidate.nodes} nodes", kept, "" if kept else why)
        self.attempts.append(attempt)
        if self.progress is not None:
            self.progress(attempt)
        if kept:
            assert failure is not None
            self.case, self.failure = candidate, failure
        return kept


def reduce_graph(
    case: Case,
    pattern: str,
    progress: Callable[[Attempt], None] | None = None,
    run: Callable[[Case], Failure | None] = run_case,
) -> tuple[Case, Failure, list[Attempt]]:
    """The smallest case found. pattern: searched in ``kind: message``. OptionError if it does not fail so at first.

    Until nothing helps: outputs left out, the end cut off, blocks of nodes made inputs, single nodes replaced by one of
    their arguments, rules and passes left out, sizes halved.
    """
    wanted = re.compile(pattern)
    failure = run(case)
    if failure is None or not wanted.search(failure.text):
        why = "it did not fail" if failure is None else failure.text
        raise OptionError(
            f"the graph alone does not fail as it did: {why}",
            expected=f"an error that matches {pattern!r}",
            mend="a wrong number may need the real tensors: write the repro with KTFX_REPRO_INPUTS=1",
        )
    search = _Search(_with_values(case), failure, wanted, run, progress, [])
    while True:
        before = _size_of(search.case)
        _fewer_outputs(search)
        _earlier_end(search)
        _blocks_as_inputs(search)
        _nodes_as_arguments(search)
        _fewer_rules(search)
        _smaller_sizes(search)
        if _size_of(search.case) >= before:
            return search.case, search.failure, search.attempts


def _size_of(case: Case) -> tuple[int, int, int, int]:
    graph = case.captured.gm.graph
    elements = sum(v.numel() for n in graph.nodes if isinstance(v := n.meta.get("val"), torch.Tensor))
    return case.nodes, len(_outputs(graph)), len(str(case.rules)), int(elements)


def _outputs(graph: fx.Graph) -> list[Any]:
    return list(output_node(graph).args[0])  # type: ignore[arg-type]


def _calls(case: Case) -> list[str]:
    return [n.name for n in case.captured.gm.graph.nodes if n.op == "call_function"]


def _with_values(case: Case) -> Case:
    """The case with every node's value among its values, so that one that becomes an input keeps what it was."""
    if case.stage != "run":
        return case
    gm = case.captured.gm
    recorder = _Recorder(gm)
    arguments = {n.name: value_of(case, n) for n in placeholders(gm.graph)}
    try:
        with torch.no_grad():
            recorder.run(*arguments.values())
    except Exception:
        # The graph itself fails: then the values up to there are what there is.
        pass
    return replace(case, values={**recorder.values, **arguments})


class _Recorder(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "call_function":
            self.values[n.name] = value
        return value


# ---- what is tried


def _fewer_outputs(search: _Search) -> None:
    """Outputs and writes left out, halves first."""

    def attempt(gone: Sequence[int]) -> bool:
        keep = [i for i in range(len(_outputs(search.case.captured.gm.graph))) if i not in set(gone)]
        return search.try_case(f"without {len(gone)} outputs", _with_outputs(search.case, keep))

    _ddmin(lambda: list(range(len(_outputs(search.case.captured.gm.graph)))), attempt, keep_one=True)


def _earlier_end(search: _Search) -> None:
    """One node as the only output: the earliest that still fails, by halving, then all that comes after it is gone."""
    names = [n for n in _calls(search.case) if _is_tensor(search.case, n)]
    low, high = 0, len(names) - 1
    while low < high:
        middle = (low + high) // 2
        if search.try_case(f"ends at {names[middle]}", _ending_at(search.case, names[middle])):
            high = middle
            present = set(_calls(search.case))
            names = [n for n in names[: middle + 1] if n in present]
            low, high = min(low, len(names) - 1), len(names) - 1
        else:
            low = middle + 1


def _blocks_as_inputs(search: _Search) -> None:
    """Blocks of neighbouring nodes become inputs, from halves of the graph down to single nodes."""

    def attempt(block: Sequence[str]) -> bool:
        return search.try_case(f"{len(block)} nodes as inputs", _as_inputs(search.case, block))

    _ddmin(lambda: _calls(search.case), attempt)


def _nodes_as_arguments(search: _Search) -> None:
    """A node replaced by one of its arguments of the same form."""
    for name in reversed(_calls(search.case)):
        for position in range(2):
            candidate = _bypassed(search.case, name, position)
            if candidate is not None and search.try_case(f"{name} as its argument {position}", candidate):
                break


def _fewer_rules(search: _Search) -> None:
    tried = True
    while tried:
        tried = False
        for change, rules in fewer_rules(search.case.rules):
            if search.try_case(change, replace(search.case, rules=rules)):
                tried = True
                break


def _smaller_sizes(search: _Search) -> None:
    """One size, or two that are bound to each other, halved wherever they stand."""
    for size in sorted(_sizes(search.case), reverse=True):
        others = [other for other in sorted(_sizes(search.case)) if other not in (size, 2, 3)]
        for pair in ((size,), *((size, other) for other in others)):
            if search.try_case(f"{', '.join(map(str, pair))} halved", _halved(search.case, pair)):
                break


def _ddmin(elements: Callable[[], list[T]], attempt: Callable[[list[T]], bool], keep_one: bool = False) -> None:
    """Take blocks away, from halves down to single elements; after one that went, those of its size again."""
    size = max(1, len(elements()) // 2)
    while size >= 1:
        start = 0
        while start < len(now := elements()):
            block = now[start : start + size]
            if (keep_one and len(block) == len(now)) or not attempt(block):
                start += size
        size //= 2


# ---- one change each


def _edited(case: Case, edit: Callable[[fx.Graph, dict[str, fx.Node]], Any]) -> Case | None:
    """The case over an edited copy, without what is then dead; None if the edit is none or leaves no graph."""
    gm = copy_graph(case.captured.gm)
    added = edit(gm.graph, {n.name: n for n in gm.graph.nodes})
    if added is None:
        return None
    for node in reversed(gm.graph.nodes):
        # Not fx's own: it keeps every op that may draw random numbers, attention among them.
        if node.op == "call_function" and not node.users:
            gm.graph.erase_node(node)
    inputs = {**case.captured.inputs, **added}
    for node in placeholders(gm.graph):
        if not node.users:
            gm.graph.erase_node(node)
    names = [n.name for n in placeholders(gm.graph)]
    if not any(n.op == "call_function" for n in gm.graph.nodes):
        return None
    kept = {name: inputs[name] for name in names}
    positions = {name: i for i, name in enumerate(n for n in names if kept[n].index >= 0)}
    kept = {n: replace(e, index=positions[n]) if n in positions else e for n, e in kept.items()}
    writes = [(i, n) for i, n in case.captured.writes if n in kept and i < len(_outputs(gm.graph))]
    constants = {n: t for n, t in case.captured.constants.items() if n in kept}
    count = len(_outputs(gm.graph)) - len(writes)
    return case.with_graph(gm, inputs=kept, writes=writes, constants=constants, num_outputs=count)


def _with_outputs(case: Case, keep: Sequence[int]) -> Case | None:
    """Only these outputs. A write stays a write as long as its new value is kept."""
    if not keep:
        return None
    written = dict(case.captured.writes)
    writes = [(keep.index(i), name) for i, name in case.captured.writes if i in keep]
    ended = replace(case, captured=replace(case.captured, writes=writes))

    def edit(graph: fx.Graph, nodes: Mapping[str, fx.Node]) -> Mapping[str, GraphInput]:
        values = _outputs(graph)
        output_node(graph).args = (tuple(values[i] for i in keep),)
        gone = [written[i] for i in written if i not in keep]
        return {name: replace(case.captured.inputs[name], mutated=False) for name in gone}

    return _edited(ended, edit)


def _ending_at(case: Case, name: str) -> Case | None:
    ended = replace(case, captured=replace(case.captured, writes=[]))

    def edit(graph: fx.Graph, nodes: Mapping[str, fx.Node]) -> Mapping[str, GraphInput]:
        output_node(graph).args = ((nodes[name],),)
        return {n: replace(e, mutated=False) for n, e in case.captured.inputs.items()}

    return _edited(ended, edit)


def _as_inputs(case: Case, block: Sequence[str]) -> Case | None:
    """Every value of the block that is read outside becomes an input. Sizes and tuples stay: no input can be one."""

    def edit(graph: fx.Graph, nodes: Mapping[str, fx.Node]) -> Mapping[str, GraphInput] | None:
        inside = {nodes[name] for name in block}
        added: dict[str, GraphInput] = {}
        taken = max((e.index for e in case.captured.inputs.values()), default=-1) + 1
        first = next(iter(graph.nodes))
        for node in [nodes[name] for name in block]:
            val = node.meta.get("val")
            if not isinstance(val, torch.Tensor) or not any(u not in inside for u in node.users):
                continue
            with graph.inserting_before(first):
                made = graph.placeholder(f"{node.name}_value")
            made.meta = {"val": val, **{k: node.meta[k] for k in ("ktfx",) if k in node.meta}}
            node.replace_all_uses_with(made, delete_user_cb=lambda u: u not in inside)
            added[made.name] = GraphInput("input", node.name, taken)
            taken += 1
        return added or None

    found = _edited(case, edit)
    if found is None or found.nodes >= case.nodes:
        return None
    values = {f"{n}_value": v for n, v in case.values.items() if f"{n}_value" in found.captured.inputs}
    return replace(found, values={**case.values, **values})


def _bypassed(case: Case, name: str, position: int) -> Case | None:
    def edit(graph: fx.Graph, nodes: Mapping[str, fx.Node]) -> Mapping[str, GraphInput] | None:
        node = nodes.get(name)
        arguments = node.all_input_nodes if node is not None else []
        if node is None or position >= len(arguments) or not _same_form(node, arguments[position]):
            return None
        node.replace_all_uses_with(arguments[position])
        return {}

    return _edited(case, edit)


def _same_form(a: fx.Node, b: fx.Node) -> bool:
    x, y = a.meta.get("val"), b.meta.get("val")
    alike = isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)
    return alike and x.shape == y.shape and x.dtype == y.dtype  # type: ignore[union-attr]


def _is_tensor(case: Case, name: str) -> bool:
    node = next(n for n in case.captured.gm.graph.nodes if n.name == name)
    return isinstance(node.meta.get("val"), torch.Tensor)


def _sizes(case: Case) -> set[int]:
    return {
        int(s)
        for n in placeholders(case.captured.gm.graph)
        if isinstance(v := n.meta.get("val"), torch.Tensor)
        for s in v.shape
        if isinstance(s, int) and s > 1
    }


def _halved(case: Case, sizes: Sequence[int]) -> Case | None:
    """The sizes halved in all inputs and literals; None where the graph does not run so."""
    gm = copy_graph(case.captured.gm)
    smaller = {s: max(1, s // 2) for s in sizes}
    change = lambda value: smaller.get(value, value) if type(value) is int else value  # noqa: E731
    for node in gm.graph.nodes:
        val = node.meta.get("val")
        if node.op == "placeholder" and isinstance(val, torch.Tensor):
            shape = [change(int(s)) for s in val.shape]
            with val.fake_mode:  # type: ignore[attr-defined]
                node.meta = {**node.meta, "val": torch.empty(shape, dtype=val.dtype, device=val.device)}
        elif node.op == "call_function":
            node.meta = dict(node.meta)
            node.args = fx.node.map_aggregate(node.args, change)  # type: ignore[assignment]
    try:
        refresh_all(gm)
    except KtfxError:
        return None
    values = {name: _cut(v, smaller) for name, v in case.values.items()}
    return replace(case.with_graph(gm), values=values)


def _cut(value: Any, smaller: Mapping[int, int]) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    for dim, size in enumerate(value.shape):
        if size in smaller:
            value = value.narrow(dim, 0, smaller[size])
    return value.contiguous()
