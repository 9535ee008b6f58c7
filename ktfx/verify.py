"""``verify: true``: every pass's graph against the one before it, and the program against the last, on real inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ktfx.errors import VerifyError
from ktfx.graph import info, op_name, placeholders
from ktfx.pass_manager import PassContext, PassRecord, packed_device
from ktfx.placed_tensor import PlacedTensor
from ktfx.program.program import Program
from ktfx.weights import WeightStore

# ‖a−b‖/‖b‖ that rounding explains: by dtype of the value.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
QUANTISED_ACTIVATIONS = 2e-2


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """‖actual−expected‖/‖expected‖ in float64; inf where one has NaN or inf and the other has not."""
    if actual.shape != expected.shape:
        return float("inf")
    a, b = actual.detach().cpu().double(), expected.detach().cpu().double()
    finite = torch.isfinite(b)
    if not torch.equal(torch.isfinite(a), finite):
        return float("inf")
    a, b = a[finite], b[finite]
    norm = torch.linalg.vector_norm(b)
    return float(torch.linalg.vector_norm(a - b) / norm) if norm > 0 else float(torch.linalg.vector_norm(a - b))


def verified(
    program: Program, records: Sequence[PassRecord], context: PassContext, store: WeightStore
) -> Callable[..., Any]:
    """The program, checked on its first call. Raises VerifyError naming the first pass and node that differ."""
    pending = [True]

    def call(*args: Any) -> Any:
        if pending[0]:
            pending[0] = False
            check_passes(records, args, context, store)
            return check_program(program, records[-1], args, context, store)
        return program(*args)

    return call


# Their values are whatever memory held: never compared.
_UNINITIALISED = ("aten.empty", "aten.new_empty")


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps (or compares) every node's value by name."""

    def __init__(
        self,
        gm: fx.GraphModule,
        expected: dict[str, Any] | None = None,
        slack: float = 0.0,
        shared: Mapping[str, tuple[str, torch.Tensor]] | None = None,
    ) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.shared = shared or {}
        self.values: dict[str, Any] = {}
        self.expected = expected
        self.slack = slack
        self.first_difference: tuple[fx.Node, float] | None = None

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if n.name not in self.shared:
            return super().fetch_args_kwargs_from_env(n)
        weight, instead = self.shared[n.name]
        args, kwargs = fx.node.map_arg((n.args, n.kwargs), lambda a: instead if a.name == weight else self.env[a])
        return args, kwargs

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.values[n.name] = value
        searching = self.expected is not None and self.first_difference is None
        if searching and n.op == "call_function" and not op_name(n).startswith(_UNINITIALISED):
            assert self.expected is not None
            before = self.expected.get(n.name)
            if isinstance(before, torch.Tensor) and isinstance(value, torch.Tensor):
                error = relative_error(value, before)
                if error > max(TOLERANCE.get(before.dtype, 0.0), self.slack):
                    self.first_difference = (n, error)
        return value


def check_passes(
    records: Sequence[PassRecord], args: Sequence[Any], context: PassContext, store: WeightStore
) -> dict[str, float]:
    """Largest relative error of any output for each pass; raises at the first over the tolerance."""
    errors: dict[str, float] = {}
    substitutes = dequantised_weights(context, store)
    shared = _shared_weights(context, store)
    slack = quantisation_slack(context)
    before: _Recorder | None = None
    with torch.no_grad():
        for record in records:
            if record.graph_before is None or record.graph_after is None:
                continue
            if before is None:
                before = _Recorder(record.graph_before, shared=shared)
                before.run(*_inputs(record.graph_before, args, context, store, substitutes))
            after = _Recorder(record.graph_after, before.values, slack, shared)
            out = after.run(*_inputs(record.graph_after, args, context, store, substitutes))
            errors[record.name] = _compare(record.name, before.values["output"], out, after, slack)
            before = after
    return errors


def _compare(name: str, expected: Sequence[Any], actual: Sequence[Any], run: _Recorder, slack: float) -> float:
    worst = 0.0
    for position, (want, got) in enumerate(zip(expected, actual, strict=True)):
        if not isinstance(want, torch.Tensor):
            continue
        error = relative_error(got, want)
        worst = max(worst, error)
        if error > max(TOLERANCE.get(want.dtype, 0.0), slack):
            found = run.first_difference
            where = (
                f"first at node {found[0].name} ({op_name(found[0])}), relative error {found[1]:.2e}"
                if found
                else "at a node that this pass made"
            )
            raise VerifyError(
                f"pass {name!r} changed what the graph computes: output {position} differs by {error:.2e}, {where}",
                module=info(found[0]).module if found else None,
                expected=f"at most {max(TOLERANCE.get(want.dtype, 0.0), slack):.0e}",
                mend="leave the pass out of `passes:`, or bisect: KTFX_BISECT_LIMIT=N runs the first N rewrites only",
            )
    return worst


def check_program(
    program: Program, last: PassRecord, args: Sequence[Any], context: PassContext, store: WeightStore
) -> Any:
    """Run the program for real and compare with the last pass's graph, mutated inputs included."""
    assert last.graph_after is not None
    with torch.no_grad():
        run = _Recorder(last.graph_after)
        expected = run.run(*_inputs(last.graph_after, args, context, store, dequantised_weights(context, store)))
        outputs = program(*args)
    slack = quantisation_slack(context)
    writes = context.captured.writes
    index = {n: context.captured.inputs[n].index for _, n in writes}
    pairs = [(f"cache {name}", expected[i], args[index[name]]) for i, name in writes]
    pairs += [
        (f"output {i}", want, got) for i, (want, got) in enumerate(zip(expected[len(writes) :], outputs, strict=True))
    ]
    for label, want, got in pairs:
        if not isinstance(want, torch.Tensor):
            continue
        got = got.fetch() if isinstance(got, PlacedTensor) else got
        error = relative_error(got, want)
        if error > max(TOLERANCE.get(want.dtype, 0.0), slack):
            raise VerifyError(
                f"the compiled program's {label} differs from the rewritten graph's by {error:.2e}",
                expected=f"at most {max(TOLERANCE.get(want.dtype, 0.0), slack):.0e}",
                mend="options={'partition_backend': 'eager'} tells whether Inductor or the placement is to blame",
            )
    return outputs


def quantisation_slack(context: PassContext) -> float:
    """The relative error that quantised activations explain: 0 where none of the graph's kernels quantises them."""
    quantised = any(p.request.activations != "model" for p in context.packed.values())
    return QUANTISED_ACTIVATIONS if quantised else 0.0


def _inputs(
    gm: fx.GraphModule,
    args: Sequence[Any],
    context: PassContext,
    store: WeightStore,
    substitutes: dict[str, torch.Tensor],
) -> list[Any]:
    values: list[Any] = []
    for node in placeholders(gm.graph):
        entry = context.captured.inputs[node.name]
        if entry.kind == "packed":
            weight = context.packed[node.name]
            tensors = store.packed(weight.request, packed_device(node.name, context))
            values.append(tensors[weight.index].to(context.captured.logical))
        elif entry.kind == "constant":
            values.append(context.captured.constants[node.name])
        elif entry.name in substitutes:
            values.append(substitutes[entry.name])
        else:
            value = args[entry.index]
            values.append(value.fetch() if isinstance(value, PlacedTensor) else value)
    return values


def dequantised_weights(context: PassContext, store: WeightStore) -> dict[str, torch.Tensor]:
    """For quantised kernels, the weights they really compute with, as the model would hold them."""
    result: dict[str, torch.Tensor] = {}
    shared = {packed for _, packed in context.shared.values()}
    apart = {context.packed[name].request for name in shared}
    for placeholder, weight in context.packed.items():
        request = weight.request
        if request in apart or request.parts[0][1] in result:
            continue
        plain = request.model_weights(store.packed(request, packed_device(placeholder, context)))
        if plain is None:
            continue
        for part, name in request.parts:
            if part in plain:
                result[name] = _as_the_model_holds_it(plain[part], store.tensor(name))
    return result


def _as_the_model_holds_it(plain: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """On the parameter's device, in its dtype; a parameter stored in eight bits could not hold the numbers."""
    return plain.to(own.device, own.dtype if own.dtype.itemsize > 1 else plain.dtype)


def _shared_weights(context: PassContext, store: WeightStore) -> dict[str, tuple[str, torch.Tensor]]:
    """Node → (placeholder, what it reads in its place), for weights that only some of their readers have quantised."""
    result: dict[str, tuple[str, torch.Tensor]] = {}
    for node, (placeholder, packed) in context.shared.items():
        request = context.packed[packed].request
        plain = request.model_weights(store.packed(request, packed_device(packed, context)))
        if plain is None:
            continue
        part, name = request.parts[0]
        result[node] = (placeholder, _as_the_model_holds_it(plain[part], store.tensor(name)))
    return result
