"""Errors after each pass, at each module's border, against the captured graph run in a wider dtype on the same inputs.

The reference makes the model's own discrete choices: where an op picks (``topk``, ``sort``), it takes the indices
of the captured graph in the model's dtype, so that a near tie between two experts is not counted as an error.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite, log10
from typing import Any

import torch
from torch import fx

from ktfx.debug.replay import PassFailure, Replay
from ktfx.debug.snapshot import NodeLine, Snapshot, boundary_nodes, snapshot
from ktfx.errors import OptionError
from ktfx.graph import info, output_node
from ktfx.pass_manager import PassContext, PassRecord, RunCount
from ktfx.state import GraphReport
from ktfx.verify import TOLERANCE, quantisation_slack, relative_error

REFERENCES = {"float64": torch.float64, "float32": torch.float32}
CAPTURED = "as captured"
_PICKS = (torch.ops.aten.topk.default, torch.ops.aten.sort.default, torch.ops.aten.sort.stable)
# A module's own rounding against the reference may be this many times larger after a rewrite before it counts.
HEADROOM = 8.0


@dataclass(frozen=True)
class Border:
    """A value that leaves a module, or an output of the graph. key: what the tables call it."""

    key: str
    module: str
    node: str


@dataclass
class PassErrors:
    """One column: relative error of each border after a pass. failed: what the pass raised, if it did."""

    name: str
    errors: dict[str, float] = field(default_factory=dict)
    failed: str | None = None
    failed_module: str | None = None


@dataclass
class NumericsReport:
    """The table. borders: rows in the order of the graph. tolerances: what each row is held to.

    fallbacks: ops that the reference could not run in the wider dtype.
    """

    reference: str
    borders: list[Border]
    columns: list[PassErrors]
    tolerances: dict[str, float]
    fallbacks: list[str]

    @property
    def first_over(self) -> tuple[str, Border | None, float] | None:
        """(pass, border, error) of the first pass with a border over its tolerance; the border is its first such."""
        for column in self.columns:
            if column.failed is not None:
                module = column.failed_module or ""
                return column.name, Border(module, module, ""), float("nan")
            for border in self.borders:
                error = column.errors.get(border.key)
                if error is not None and error > self.tolerances[border.key]:
                    return column.name, border, error
        return None

    def to_json(self) -> dict[str, Any]:
        found = self.first_over
        return {
            "reference": self.reference,
            "ok": found is None,
            "first_over": (
                {"pass": found[0], "module": found[1].module, "border": found[1].key, "error": json_number(found[2])}
                if found is not None and found[1] is not None
                else None
            ),
            "passes": [{**asdict(c), "errors": {k: json_number(e) for k, e in c.errors.items()}} for c in self.columns],
            "borders": [{**asdict(b), "tolerance": self.tolerances[b.key]} for b in self.borders],
            "fallbacks": self.fallbacks,
        }


def numerics(
    replay: Replay, tolerance: float | None = None, reference: str = "float64", count: RunCount | None = None
) -> NumericsReport:
    """Run the passes once and each graph once.

    tolerance: None holds each value to its dtype's, or to ``HEADROOM`` times what the captured graph loses there.
    count: what the run's earlier graphs have counted (``KTFX_BISECT_LIMIT`` counts through all); it goes on counting.
    """
    if reference not in REFERENCES:
        raise OptionError(f"reference {reference!r}", expected="float64 or float32")
    records: list[PassRecord] = []
    failure: PassFailure | None = None
    try:
        context = replay.run(after_pass=records.append, count=count).context
    except PassFailure as raised:
        failure, context = raised, raised.context
    original = replay.context()
    captured = replay.captured_graph
    plan = _Borders(captured, context)
    own = _Run(replay, captured, original, plan.names(captured), keep_picks=True)
    wide = _Wide(replay, captured, original, plan.names(captured), REFERENCES[reference], own.picks)
    columns = [PassErrors(CAPTURED, plan.errors(captured, own.values, wide.values))]
    for record in records:
        gm = record.graph_after
        assert gm is not None
        values = _Run(replay, gm, context, plan.names(gm)).values
        columns.append(PassErrors(record.name, plan.errors(gm, values, wide.values)))
    if failure is not None:
        error = failure.error
        columns.append(PassErrors(_failing_pass(replay, records), failed=error.what, failed_module=error.module))
    tolerances = {
        b.key: tolerance
        if tolerance is not None
        else max(_dtype_tolerance(own.values.get(b.node), context), HEADROOM * columns[0].errors.get(b.key, 0.0))
        for b in plan.borders
    }
    return NumericsReport(reference, plan.borders, columns, tolerances, wide.fallbacks)


def run_numerics(
    replays: Sequence[Replay], tolerance: float | None, reference: str, judged: Sequence[GraphReport]
) -> list[tuple[str, NumericsReport]]:
    """(phase, report) of each judged graph of a run, numbered as in the run."""
    count, found = RunCount(), []
    for replay in replays:
        if replay.report in judged:
            found.append((replay.report.phase, numerics(replay, tolerance, reference, count)))
        else:
            with contextlib.suppress(PassFailure):
                replay.run(keep_graphs=False, count=count)
    return found


def _failing_pass(replay: Replay, records: Sequence[PassRecord]) -> str:
    from ktfx.pass_manager import build_pipeline

    names = [p.name for p in build_pipeline(replay.state.ruleset.passes)]
    return names[len(records)] if len(records) < len(names) else "?"


def _dtype_tolerance(value: Any, context: PassContext) -> float:
    own = TOLERANCE.get(value.dtype, 1e-4) if isinstance(value, torch.Tensor) else 1e-4
    return max(own, quantisation_slack(context))


def json_number(value: float) -> float | str:
    """JSON has no inf and nan: they are text."""
    return value if isfinite(value) else str(value)


class _Borders:
    """The rows, taken from the captured graph, and how a rewritten graph's values match them."""

    def __init__(self, captured: fx.GraphModule, context: PassContext) -> None:
        self.shot = snapshot(captured)
        self.borders: list[Border] = []
        self.of_module: dict[str, list[NodeLine]] = {}
        for module, node in boundary_nodes(self.shot):
            if not _floating(node):
                continue
            self.of_module.setdefault(module, []).append(node)
        counts: dict[str, int] = {}
        for module, nodes in self.of_module.items():
            for node in nodes:
                counts[module] = counts.get(module, 0) + 1
                suffix = f" [{counts[module]}]" if len(nodes) > 1 else ""
                self.borders.append(Border(module + suffix, module, node.name))
        position = {n.name: i for i, n in enumerate(self.shot.nodes)}
        # In the order of the graph, the inner module before the one that holds it.
        self.borders.sort(key=lambda b: (position[b.node], -b.module.count(".")))
        self.outputs = self._outputs(captured, context)
        self.borders += [border for border, _ in self.outputs]

    @staticmethod
    def _outputs(captured: fx.GraphModule, context: PassContext) -> list[tuple[Border, int]]:
        written = dict(context.captured.writes)
        found = []
        for index, value in enumerate(output_node(captured.graph).args[0]):  # type: ignore[arg-type]
            if not isinstance(value, fx.Node):
                continue
            name = written.get(index)
            source = context.captured.inputs[name].name if name is not None else ""
            label = f"written to {_readable(source)}" if name is not None else f"output {index - len(written)}"
            found.append((Border(label, info(value).module, value.name), index))
        return found

    def names(self, gm: fx.GraphModule) -> set[str]:
        """The nodes of a graph whose values are wanted."""
        wanted = {node.name for _, node in boundary_nodes(snapshot(gm)) if _floating(node)}
        outputs = output_node(gm.graph).args[0]
        # A value that a transfer now carries over the border leaves no more by itself; it is still the border's value.
        wanted |= {border.node for border in self.borders}
        return wanted | {v.name for v in outputs if isinstance(v, fx.Node)}  # type: ignore[union-attr]

    def errors(self, gm: fx.GraphModule, values: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, float]:
        shot = snapshot(gm)
        matched = self._matched(shot)
        errors: dict[str, float] = {}
        for border in self.borders:
            name = matched.get((border.module, border.node))
            if name is not None and name in values and border.node in reference:
                _note(errors, border.key, values[name], reference[border.node])
        outputs = output_node(gm.graph).args[0]
        for border, index in self.outputs:
            value = outputs[index]  # type: ignore[index]
            if isinstance(value, fx.Node) and value.name in values and border.node in reference:
                _note(errors, border.key, values[value.name], reference[border.node])
        return errors

    def _matched(self, shot: Snapshot) -> dict[tuple[str, str], str]:
        """(module, captured node) → the node of this graph that now carries the value over the module's border.

        A name that is still there is itself. What was rewritten is paired in order with the new values that leave the
        same module, if the counts and forms agree.
        """
        present = {n.name for n in shot.nodes}
        result: dict[tuple[str, str], str] = {}
        now: dict[str, list[NodeLine]] = {}
        for module, node in boundary_nodes(shot):
            if _floating(node):
                now.setdefault(module, []).append(node)
        known = {n.name for n in self.shot.nodes}
        for module, nodes in self.of_module.items():
            gone = [n for n in nodes if n.name not in present]
            new = [n for n in now.get(module, []) if n.name not in known and n.op != "ktfx.transfer.default"]
            result |= {(module, n.name): n.name for n in nodes if n.name in present}
            if len(gone) == len(new):
                result |= {
                    (module, a.name): b.name for a, b in zip(gone, new, strict=True) if _elements(a) == _elements(b)
                }
        return result


def _readable(source: str) -> str:
    """``L['kwargs']['past_key_values'].layers[0].keys`` → ``past_key_values.layers[0].keys``."""
    text = re.sub(r"^L\['(?:self|kwargs)'\]\.?", "", source)
    return re.sub(r"\['([^']*)'\]", r".\1", re.sub(r"^L\['([^']*)'\]", r"\1", text)).lstrip(".")


def _note(errors: dict[str, float], key: str, value: Any, wanted: Any) -> None:
    if isinstance(value, torch.Tensor) and isinstance(wanted, torch.Tensor) and value.numel() == wanted.numel():
        errors[key] = relative_error(value.reshape(wanted.shape), wanted)


def _floating(node: NodeLine) -> bool:
    return node.form.startswith(("f64", "f32", "bf16", "f16"))


def _elements(node: NodeLine) -> list[str]:
    """The dtype and the sizes without 1s and order: a rewrite may flatten (1, T, H) to (T, H)."""
    dtype, _, sizes = node.form.partition("[")
    return [dtype, *sorted(s for s in sizes.rstrip("]").split(", ") if s != "1")]


class _Run(fx.Interpreter):
    """A graph in its own dtypes; keeps the wanted values, and what ops that pick have picked."""

    def __init__(
        self, replay: Replay, gm: fx.GraphModule, context: PassContext, wanted: set[str], keep_picks: bool = False
    ) -> None:
        super().__init__(gm)
        self.wanted, self.keep_picks = wanted, keep_picks
        self.values: dict[str, Any] = {}
        self.picks: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            self.run(*replay.arguments(gm, context, {}))

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.wanted:
            self.values[n.name] = value
        if self.keep_picks and n.target in _PICKS:
            self.picks[n.name] = value[1]
        return value


class _Wide(fx.Interpreter):
    """A graph with every floating value in a wider dtype, making the same discrete choices as the run before it."""

    def __init__(
        self,
        replay: Replay,
        gm: fx.GraphModule,
        context: PassContext,
        wanted: set[str],
        dtype: torch.dtype,
        picks: Mapping[str, torch.Tensor],
    ) -> None:
        super().__init__(gm)
        self.wanted, self.dtype, self.picks = wanted, dtype, picks
        self.values: dict[str, Any] = {}
        self.fallbacks: list[str] = []
        with torch.no_grad():
            self.run(*[self.wide(v) for v in replay.arguments(gm, context, {})])

    def wide(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.dtype.is_floating_point:
            return value.to(self.dtype)
        return value

    def run_node(self, n: fx.Node) -> Any:
        value = self._picked(n) if n.name in self.picks else super().run_node(n)
        if n.name in self.wanted:
            self.values[n.name] = value
        return value

    def _picked(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        position = 1 if n.target is torch.ops.aten.sort.default else 2
        dim = kwargs.get("dim", args[position] if len(args) > position else -1)
        index = self.picks[n.name]
        return torch.gather(args[0], dim, index), index

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = _mapped((args, kwargs), self._dtype)
        try:
            return self._result(super().call_function(target, args, kwargs))
        except (RuntimeError, NotImplementedError) as error:
            if str(target) not in self.fallbacks:
                self.fallbacks.append(str(target))
            for narrow in (torch.float32, torch.bfloat16, torch.float16):
                if narrow is self.dtype:
                    continue
                try:
                    found = super().call_function(target, *_mapped((args, kwargs), _narrowing(narrow)))
                except (RuntimeError, NotImplementedError):
                    continue
                return self._result(found)
            raise error

    def _dtype(self, value: Any) -> Any:
        return self.dtype if isinstance(value, torch.dtype) and value.is_floating_point else value

    def _result(self, value: Any) -> Any:
        return _mapped(value, self.wide)


def _narrowing(dtype: torch.dtype) -> Callable[[Any], Any]:
    def narrow(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.dtype.is_floating_point:
            return value.to(dtype)
        return dtype if isinstance(value, torch.dtype) and value.is_floating_point else value

    return narrow


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(value, (list, tuple)):
        parts = [_mapped(v, function) for v in value]
        return tuple(parts) if isinstance(value, tuple) else parts
    if isinstance(value, dict):
        return {k: _mapped(v, function) for k, v in value.items()}
    return function(value)


# ---- the plot


def plot(report: NumericsReport, width: int = 960, height: int = 420) -> str:
    """An SVG: error (log scale) over the borders in the graph's order, a line a pass, the tolerance dashed."""
    left, top, right, bottom = 70, 20, 200, 60
    keys = [b.key for b in report.borders]
    finite = [e for c in report.columns for e in c.errors.values() if isfinite(e) and e > 0]
    high = max([0.0, *(log10(e) for e in finite)])
    low = min([-8.0, *(log10(e) for e in finite)])
    step = (width - left - right) / max(1, len(keys) - 1)

    def x(i: int) -> float:
        return left + i * step

    def y(error: float) -> float:
        level = high if not isfinite(error) else max(low, log10(error) if error > 0 else low)
        return top + (high - level) / (high - low) * (height - top - bottom)

    colours = ("#2f6fde", "#c2571a", "#1d8a5b", "#9b3fbf", "#b8334f", "#0f8b99", "#77701a", "#5a5f6b")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        'font-size="12"><rect width="100%" height="100%" fill="white"/>'
    ]
    for level in range(int(low) - 1, int(high) + 1):
        if low <= level <= high:
            parts.append(
                f'<path d="M{left},{y(10.0**level):.1f} H{width - right}" stroke="#ddd"/>'
                f'<text x="{left - 8}" y="{y(10.0**level) + 4:.1f}" text-anchor="end">1e{level}</text>'
            )
    held = " ".join(f"{x(i):.1f},{y(report.tolerances[k]):.1f}" for i, k in enumerate(keys))
    parts.append(f'<polyline points="{held}" fill="none" stroke="#888" stroke-dasharray="4 3"/>')
    for number, column in enumerate(report.columns):
        colour = colours[number % len(colours)]
        points = " ".join(f"{x(i):.1f},{y(column.errors[k]):.1f}" for i, k in enumerate(keys) if k in column.errors)
        label = column.name + (" (failed)" if column.failed else "")
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts.append(f'<text x="{width - right + 12}" y="{top + 14 + 18 * number}" fill="{colour}">{label}</text>')
    parts.append(
        f'<text x="{width - right + 12}" y="{top + 14 + 18 * len(report.columns)}" fill="#888">- - tolerance</text>'
    )
    for share in (0.0, 0.5, 1.0):
        index = round(share * (len(keys) - 1)) if keys else 0
        anchor = {0.0: "start", 0.5: "middle", 1.0: "end"}[share]
        if keys:
            parts.append(
                f'<text x="{x(index):.1f}" y="{height - 30}" text-anchor="{anchor}">{_escaped(keys[index])}</text>'
            )
    parts.append(
        f'<text x="{left}" y="{height - 10}" fill="#666">relative error against {report.reference}, '
        "at each module's border in the order of the graph</text></svg>"
    )
    return "\n".join(parts) + "\n"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def summary_rows(report: NumericsReport, most: int = 24) -> list[Border]:
    """The rows worth showing: those over their tolerance first seen, the largest errors, and the outputs."""
    if len(report.borders) <= most:
        return report.borders

    def worst(border: Border) -> float:
        return max((c.errors.get(border.key, 0.0) for c in report.columns), default=0.0)

    found = report.first_over
    chosen = {b.key for b in sorted(report.borders, key=worst, reverse=True)[: most - 4]}
    if found is not None and found[1] is not None:
        chosen.add(found[1].key)
    chosen |= {b.key for b in report.borders if b.key.startswith("output ")}
    return [b for b in report.borders if b.key in chosen]
