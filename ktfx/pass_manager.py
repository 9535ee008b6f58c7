"""Passes: what one is, how they are found, run in order, checked after each, and recorded.

A pass edits the graph and returns what it did; the manager keeps the record, so ``explain``, diffs, bisection and the
viewer read it and no pass knows about them.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module

from ktfx.errors import KtfxError, Origin, PassError, RuleError
from ktfx.graph import info, op_name, output_node, placeholders

if TYPE_CHECKING:
    from ktfx.capture import Captured
    from ktfx.devices import DeviceMap
    from ktfx.resolve import Resolution
    from ktfx.weights import PackedWeight


@dataclass(frozen=True)
class Rewrite:
    """One change that a pass made.

    rule: label of the rule that asked for it, None for a default pass. origin: where that rule stands.
    module: the dotted path of the region. before, after: op names. nodes_before, nodes_after: the nodes' names.
    number: its place among all rewrites of the run, all graphs together, from 1 (what bisection counts).
    """

    what: str
    module: str = ""
    rule: str | None = None
    origin: Origin | None = None
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    nodes_before: tuple[str, ...] = ()
    nodes_after: tuple[str, ...] = ()
    number: int = 0


@dataclass(frozen=True)
class Miss:
    """A place where a pass was asked to rewrite, or nearly did, and did not: the first thing that failed."""

    module: str
    why: str
    rule: str | None = None


@dataclass
class RunCount:
    """How many optional passes and optional rewrites the graphs of one run have counted, run or not.

    One model's graphs share it, so that a number names one rewrite of one graph.
    """

    passes: int = 0
    rewrites: int = 0


@dataclass
class PassContext:
    """What a pass may read besides the graph, and where it leaves what is not in the graph.

    captured: the graph's ends (inputs, writes, phase). resolution: module path → placement. devices: name → device.
    packed: placeholder name → the packed weight it stands for; passes that add such a placeholder add it here.
    logical_name: the device name where inputs come from and outputs go back to.
    count: what the run's graphs have counted so far; bisect_limit, pass_limit: at which numbers bisection stops.
    shared: name of a replaced node → (placeholder of the weight that it read, packed placeholder read instead), where
        something else goes on reading that weight as it is (a tied embedding).
    """

    captured: Captured
    resolution: Resolution
    devices: DeviceMap
    logical_name: str
    packed: dict[str, PackedWeight] = field(default_factory=dict)
    shared: dict[str, tuple[str, str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)
    rewrites: list[Rewrite] = field(default_factory=list)
    bisect_limit: int | None = None
    pass_limit: int | None = None
    partitioning: Any = None
    count: RunCount = field(default_factory=RunCount)

    @property
    def phase(self) -> str:
        return self.captured.phase

    def allows(self, what: str, module: str) -> bool:
        """Count one optional rewrite; False if bisection stops before it. Call it right before the edit."""
        self.count.rewrites += 1
        number = self.count.rewrites
        if self.bisect_limit is None:
            return True
        allowed = number <= self.bisect_limit
        word = "running" if allowed else "NOT running"
        print(f"ktfx bisect: {word} rewrite ({number}) {what} on {module!r} in {self.phase}")
        return allowed

    def record(self, rewrite: Rewrite) -> None:
        self.rewrites.append(
            Rewrite(**{**{f.name: getattr(rewrite, f.name) for f in fields(rewrite)}, "number": self.count.rewrites})
        )

    def miss(self, module: str, why: str, rule: str | None = None) -> None:
        self.misses.append(Miss(module, why, rule))

    def warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)


class Pass:
    """The base of every pass: a name, typed options, and ``run``.

    A subclass sets ``name``, gives ``Options`` (a dataclass whose field docstrings or ``metadata['doc']`` describe
    them) and defines ``run(gm, context)``. ``requires`` names passes that must come before it.
    """

    name: ClassVar[str] = ""
    numerics_preserving: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = ()

    @dataclass(frozen=True)
    class Options:
        """No options."""

    def __init__(self, options: Any = None) -> None:
        self.options = options if options is not None else self.Options()

    def run(self, gm: fx.GraphModule, context: PassContext) -> None:
        raise NotImplementedError


@dataclass
class PassRecord:
    """What one pass did: the manager's record, in the order of the run."""

    name: str
    options: Any
    seconds: float
    rewrites: list[Rewrite]
    misses: list[Miss]
    ops_before: Counter[str]
    ops_after: Counter[str]
    graph_before: fx.GraphModule | None = None
    graph_after: fx.GraphModule | None = None


_PASSES: dict[str, type[Pass]] = {}


def register_pass(cls: type[Pass]) -> type[Pass]:
    """Class decorator: make a pass known by its name. Other packages use the entry-point group ``ktfx.passes``."""
    if not cls.name:
        raise PassError(f"{cls.__name__} has no name", mend="set `name` on the class")
    known = _PASSES.get(cls.name)
    if known is not None and known.__qualname__ != cls.__qualname__:
        raise PassError(f"a pass named {cls.name!r} is registered already, by {known.__module__}")
    _PASSES[cls.name] = cls
    return cls


def registered_passes() -> dict[str, type[Pass]]:
    """Every pass by name: those of ``ktfx.passes`` and those that installed packages provide."""
    import ktfx.passes
    from ktfx.ops import load_ops

    load_ops()  # the passes name ktfx's own ops when they are imported
    for module in pkgutil.iter_modules(ktfx.passes.__path__):
        importlib.import_module(f"ktfx.passes.{module.name}")
    for entry in entry_points(group="ktfx.passes"):
        if entry.name not in _PASSES:
            register_pass(entry.load())
    return dict(_PASSES)


# The default pipeline, in the order of the run; a file's `passes:` chooses among the optional ones.
DEFAULT_PIPELINE = (
    "resolve_rules",
    "rewrite_experts",
    "rewrite_linears",
    "match_patterns",
    "fuse_attention",
    "absorb_mla",
    "fuse_router",
    "fuse_rope",
    "fuse_norms",
    "group_ropes",
    "write_caches",
    "decode_linears",
    "gate_linears",
    "sum_linears",
    "norm_linears",
    "assign_devices",
    "insert_transfers",
    "partition_by_device",
)
REQUIRED = frozenset({"resolve_rules", "assign_devices", "insert_transfers", "partition_by_device"})


def build_pipeline(requests: Sequence[Any] | None) -> list[Pass]:
    """The passes to run. ``requests`` is a rule file's ``passes:`` (objects with name, options, origin) or None.

    The required passes are put in at their places; a request for an unknown pass or option is a RuleError.
    """
    known = registered_passes()
    if requests is None:
        return [known[name]() for name in DEFAULT_PIPELINE if name in known]
    chosen: list[Pass] = []
    for request in requests:
        cls = known.get(request.name)
        if cls is None:
            from ktfx.text import near

            raise RuleError(
                f"unknown pass {request.name!r}{near(request.name, known)}",
                origin=request.origin,
                expected="one of " + ", ".join(sorted(known)),
            )
        chosen.append(cls(_options(cls, request.options, request.origin)))
    required = [n for n in DEFAULT_PIPELINE if n in REQUIRED]
    pipeline = list(chosen)
    for name in required:
        order = [p.name for p in pipeline]
        if name not in order:
            later = [order.index(n) for n in required[required.index(name) + 1 :] if n in order]
            place = 0 if name == "resolve_rules" else min(later, default=len(order))
            pipeline.insert(place, known[name]())
    order = [p.name for p in pipeline]
    if [n for n in order if n in REQUIRED] != required:
        raise RuleError(
            f"the passes come in an order that cannot work: {', '.join(order)}",
            expected="resolve_rules, the rewrites, assign_devices, insert_transfers, partition_by_device",
            mend="leave the required passes out: they are put in at their places",
        )
    return pipeline


def _options(cls: type[Pass], given: Mapping[str, Any], origin: Origin | None) -> Any:
    names = {f.name for f in fields(cls.Options)}
    for key in given:
        if key not in names:
            from ktfx.text import near

            raise RuleError(
                f"pass {cls.name!r} has no option {key!r}{near(key, names)}",
                origin=origin,
                expected="one of " + (", ".join(sorted(names)) or "none"),
            )
    return cls.Options(**given)


def run_pipeline(
    pipeline: Sequence[Pass],
    gm: fx.GraphModule,
    context: PassContext,
    *,
    keep_graphs: bool = False,
    after_pass: Callable[[PassRecord], None] | None = None,
) -> list[PassRecord]:
    """Run the passes in order, check the graph after each, and return the record.

    keep_graphs: keep a copy of the graph before and after each pass (verify and tracing read them).
    KTFX_BISECT_LIMIT and KTFX_BISECT_PASSES in the environment: how many rewrites, and optional passes, to run.
    """
    context.bisect_limit = _limit("KTFX_BISECT_LIMIT", "rewrites", context.bisect_limit)
    context.pass_limit = _limit("KTFX_BISECT_PASSES", "optional passes", context.pass_limit)
    signature = _signature(gm.graph)
    records: list[PassRecord] = []
    graph_before = copy_graph(gm) if keep_graphs else None
    placed = False
    for current in pipeline:
        if current.name not in REQUIRED:
            context.count.passes += 1
            if not _pass_allowed(current.name, context):
                continue
        placed = placed or current.name == "insert_transfers"
        ops_before = _count_ops(gm.graph)
        rewrites_before, misses_before = len(context.rewrites), len(context.misses)
        start = time.perf_counter()
        try:
            current.run(gm, context)
        except KtfxError:
            raise
        except Exception as error:
            raise PassError(
                f"pass {current.name!r} failed: {type(error).__name__}: {error}",
                mend="report it with the model's config and the rule file; without it in `passes:` the rest goes on",
            ) from error
        seconds = time.perf_counter() - start
        _check(current.name, gm, context, signature, placed)
        graph_after = copy_graph(gm) if keep_graphs else None
        record = PassRecord(
            name=current.name,
            options=current.options,
            seconds=seconds,
            rewrites=context.rewrites[rewrites_before:],
            misses=context.misses[misses_before:],
            ops_before=ops_before,
            ops_after=_count_ops(gm.graph),
            graph_before=graph_before,
            graph_after=graph_after,
        )
        records.append(record)
        graph_before = graph_after
        if after_pass is not None:
            after_pass(record)
    return records


def _limit(variable: str, counted: str, otherwise: int | None) -> int | None:
    text = os.environ.get(variable)
    if text is None:
        return otherwise
    if not text.lstrip("-").isdigit():
        raise KtfxError(f"{variable}={text!r} is no number", mend=f"give the number of {counted} to run")
    return int(text)


def _pass_allowed(name: str, context: PassContext) -> bool:
    if context.pass_limit is None:
        return True
    allowed = context.count.passes <= context.pass_limit
    word = "running" if allowed else "NOT running"
    print(f"ktfx bisect: {word} pass ({context.count.passes}) {name} in {context.phase}")
    return allowed


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy whose nodes share their meta's values with the original's; Python code is made when first asked for."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, env)
    graph.output(output)
    # Lazily: a copy that is only read or interpreted never needs its Python code, which takes longer than the copy.
    with _use_lazy_graph_module(True):
        return _make_graph_module(gm, graph)


def _count_ops(graph: fx.Graph) -> Counter[str]:
    return Counter(op_name(n) for n in graph.nodes if n.op == "call_function")


def _signature(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """Shapes and dtypes of all outputs: no pass may change them."""
    result: list[tuple[Any, ...]] = []
    for value in output_node(graph).args[0]:  # type: ignore[union-attr]
        val = value.meta["val"] if isinstance(value, fx.Node) else value
        if isinstance(val, torch.Tensor):
            result.append((str(tuple(val.shape)), val.dtype))
        else:
            result.append((type(val).__name__,))
    return result


def _check(name: str, gm: fx.GraphModule, context: PassContext, signature: list[tuple[Any, ...]], placed: bool) -> None:
    """The invariants that hold after every pass. placed: ``insert_transfers`` has run, so devices must agree."""
    try:
        gm.graph.lint()
    except RuntimeError as error:
        raise PassError(f"after pass {name!r} the graph does not lint: {error}") from error
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "call_function") and "val" not in node.meta:
            raise PassError(
                f"pass {name!r} left node {node.name} ({op_name(node)}) without meta",
                module=info(node).module,
                mend="add nodes through ktfx.graph.insert_call",
            )
    now = _signature(gm.graph)
    if now != signature:
        changed = [i for i, (a, b) in enumerate(zip(signature, now, strict=False)) if a != b]
        raise PassError(
            f"pass {name!r} changed output {changed[0] if changed else len(now)}: "
            f"{signature[changed[0]] if changed else len(signature)} became {now[changed[0]] if changed else len(now)}"
        )
    if placed:
        _check_devices(name, gm.graph, context)


def _check_devices(name: str, graph: fx.Graph, context: PassContext) -> None:
    """No value is read on a device that it is not on; no mutation is folded across devices."""
    from ktfx.ops.transfer import is_transfer, transfer_ends

    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if is_transfer(node):
            source, _ = transfer_ends(node)
            producer = node.args[0]
            assert isinstance(producer, fx.Node)
            where = value_device(producer, context)
            if where is not None and where != source:
                raise PassError(
                    f"after {name!r}: {node.name} moves {producer.name} from {source}, but it is on {where}",
                    module=info(node).module,
                )
            continue
        here = info(node).device
        if here is None:
            continue
        for argument in node.all_input_nodes:
            where = value_device(argument, context)
            if where is not None and where != here:
                raise PassError(
                    f"after {name!r}: {node.name} ({op_name(node)}) runs on {here} and reads {argument.name}, "
                    f"which is on {where}",
                    module=info(node).module,
                    mend="every value that crosses devices needs a transfer node",
                )


def value_device(node: fx.Node, context: PassContext) -> str | None:
    """The device name on which a node's value lies; None for weights (bound wherever they are read) and integers."""
    if node.op == "placeholder":
        entry = context.captured.inputs.get(node.name)
        if entry is None or entry.kind in ("packed", "constant", "symint", "parameter", "buffer"):
            return None if entry is None or not entry.mutated else (entry.home or context.logical_name)
        return entry.home or context.logical_name
    return info(node).device


def packed_device(placeholder: str, context: PassContext) -> str:
    """The device name where a packed weight is read."""
    home = context.captured.inputs[placeholder].home
    if home is not None:
        return home
    parameter = context.packed[placeholder].request.parts[0][1]
    return context.resolution.glue_device(parameter.rpartition(".")[0], context.phase)


def input_nodes(gm: fx.GraphModule, context: PassContext, *kinds: str) -> list[fx.Node]:
    """The placeholders of the given kinds."""
    return [
        n
        for n in placeholders(gm.graph)
        if n.name in context.captured.inputs and context.captured.inputs[n.name].kind in kinds
    ]
