"""Run some passes on a small model's graph: what it was before, what it is after, and what both compute."""

from __future__ import annotations

import difflib
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ktfx.capture import capture
from ktfx.devices import device_map
from ktfx.graph import info, op_name, placeholders
from ktfx.matcher import described
from ktfx.ops import load_ops
from ktfx.pass_manager import PassContext, PassRecord, registered_passes, run_pipeline
from ktfx.resolve import resolve
from ktfx.ruleset import Ruleset, load_ruleset


@dataclass
class PassRun:
    """before, after: the graphs. out: what the rewritten graph computes. expected: the model's own value."""

    before: fx.GraphModule
    after: fx.GraphModule
    context: PassContext
    records: list[PassRecord]
    out: Any
    expected: Any

    @property
    def ops(self) -> Counter[str]:
        return Counter(op_name(n) for n in self.after.graph.nodes if n.op == "call_function")

    @property
    def ops_before(self) -> Counter[str]:
        return Counter(op_name(n) for n in self.before.graph.nodes if n.op == "call_function")

    def node(self, name: str) -> fx.Node:
        return next(n for n in self.after.graph.nodes if n.name == name)

    def diff(self) -> str:
        """The graphs' unified diff, without context lines far from a change."""
        lines = difflib.unified_diff(
            graph_lines(self.before), graph_lines(self.after), "before", "after", "", "", n=2, lineterm=""
        )
        return "\n".join(lines) + "\n"


def graph_inputs(gm: fx.GraphModule, context: PassContext, args: tuple[Any, ...]) -> list[Any]:
    """What the graph's placeholders stand for: arguments by position, and packed weights made from the model's own."""
    values = []
    for node in placeholders(gm.graph):
        entry = context.captured.inputs[node.name]
        if entry.kind == "packed":
            weight = context.packed[node.name]
            tensors = {part: context.captured.model.get_parameter(name).detach() for part, name in weight.request.parts}
            values.append(weight.request.pack(tensors, torch.device("cpu"))[weight.index])
        else:
            values.append(args[entry.index])
    return values


def graph_lines(gm: fx.GraphModule) -> list[str]:
    return [f"{described(n)}  # {info(n).module}" for n in gm.graph.nodes if n.op == "call_function"]


def run_passes(
    model: nn.Module,
    rules: dict[str, Any] | Ruleset,
    *inputs: Any,
    passes: tuple[str, ...] = ("match_patterns",),
    dynamic_dims: tuple[int, ...] = (),
    options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> PassRun:
    """Capture the model's graph, resolve the rules, run ``passes`` alone, and run the graph that comes out.

    dynamic_dims: dimensions of the first input that are traced as symbols.
    """
    load_ops()
    ruleset = rules if isinstance(rules, Ruleset) else load_ruleset({"ktfx": 1, "default_device": "cpu", **rules})
    found: list[PassRun] = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        captured = capture(gm, example_inputs, model=model)
        devices = device_map(ruleset, "cpu")
        context = PassContext(captured, resolve(ruleset, model), devices, "cpu")
        known = registered_passes()
        pipeline = [known[p]((options or {}).get(p)) for p in passes]
        records = run_pipeline(pipeline, captured.gm, context, keep_graphs=True)
        before, after = records[0].graph_before, records[-1].graph_after
        assert before is not None and after is not None
        found.append(PassRun(before, after, context, records, None, None))
        return lambda *args: captured.gm(*graph_inputs(captured.gm, context, args))

    torch._dynamo.reset()
    for dim in dynamic_dims:
        torch._dynamo.mark_dynamic(inputs[0], dim)
    model.eval()
    with torch.no_grad():
        expected = model(*inputs, **kwargs)
        try:
            out = torch.compile(model, backend=backend)(*inputs, **kwargs)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            raise error.inner_exception from None
    (run,) = found  # a graph break would give several
    run.out, run.expected = out, expected
    return run
