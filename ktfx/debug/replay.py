"""The passes again on a captured graph, and its graphs on the first call's inputs: no model code, no Dynamo."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import fx

from ktfx.debug.inputs import packed_values
from ktfx.errors import KtfxError, OptionError
from ktfx.graph import placeholders
from ktfx.pass_manager import PassContext, PassRecord, RunCount, build_pipeline, copy_graph, run_pipeline
from ktfx.state import GraphReport, ModelState
from ktfx.verify import TOLERANCE, dequantised_weights, quantisation_slack


@dataclass
class Replay:
    """A graph as it was captured, and what its passes need.

    values: the first call's arguments by placeholder name. captured: copied for every run, for passes edit it.
    """

    state: ModelState
    report: GraphReport
    values: Mapping[str, Any]

    @staticmethod
    def of(state: ModelState, report: GraphReport) -> Replay:
        if report.context is None or report.inputs is None or not report.records:
            raise OptionError(
                "this graph was compiled without its record, or never called",
                mend="compile with options={'keep_graphs': True} and call the model once",
            )
        return Replay(state, report, report.inputs)

    @property
    def captured_graph(self) -> fx.GraphModule:
        gm = self.report.records[0].graph_before
        assert gm is not None
        return gm

    def context(self, count: RunCount | None = None) -> PassContext:
        """A fresh context over a copy of the captured graph. count: what the run's earlier graphs have counted."""
        old = self.report.context
        assert old is not None
        gm = copy_graph(self.captured_graph)
        names = {n.name for n in placeholders(gm.graph)}
        inputs = {n: e for n, e in old.captured.inputs.items() if n in names}
        captured = replace(old.captured, gm=gm, inputs=inputs, writes=list(old.captured.writes))
        return PassContext(captured, old.resolution, old.devices, old.logical_name, count=count or RunCount())

    def run(
        self,
        *,
        limit: int | None = None,
        passes: int | None = None,
        after_pass: Callable[[PassRecord], None] | None = None,
        checkpoint: Callable[[Checkpoint], None] | None = None,
        keep_graphs: bool = True,
        count: RunCount | None = None,
        resume: Checkpoint | None = None,
    ) -> Replayed:
        """The passes once more, stopped after rewrite number ``limit`` or optional pass number ``passes``.

        count: what the run's earlier graphs have counted; it goes on counting. resume: start where an earlier run was
        after some pass. checkpoint: called with such a place after each pass up to ``insert_transfers``, if all run.
        Raises PassFailure if a pass fails; ``after_pass`` has then seen the passes before it.
        """
        count = count if count is not None else RunCount()
        start = replace(count)
        pipeline = build_pipeline(self.state.ruleset.passes)
        if resume is not None:
            context = _copied(resume.context)
            count.passes += resume.counted.passes
            count.rewrites += resume.counted.rewrites
            context.count = count
            pipeline = pipeline[resume.done :]
        else:
            context = self.context(count)
        context.bisect_limit, context.pass_limit = limit, passes
        log = io.StringIO()
        done: list[str] = []

        def note(record: PassRecord) -> None:
            done.append(record.name)
            if after_pass is not None:
                after_pass(record)
            # From insert_transfers on the manager checks devices, which a resumed run would not know to do.
            if checkpoint is not None and "insert_transfers" not in done:
                counted = RunCount(count.passes - start.passes, count.rewrites - start.rewrites)
                checkpoint(Checkpoint(len(done), counted, _copied(context)))

        try:
            with torch.no_grad(), contextlib.redirect_stdout(log):
                records = run_pipeline(pipeline, context.captured.gm, context, keep_graphs=keep_graphs, after_pass=note)
        except KtfxError as error:
            raise PassFailure(error, context, log.getvalue()) from error
        return Replayed(context, records, log.getvalue())

    def arguments(self, gm: fx.GraphModule, context: PassContext, substitutes: Mapping[str, Any]) -> list[Any]:
        """The values of a graph's placeholders. substitutes: parameter name → what stands for it."""
        packed = packed_values(context, self.state.store)
        found = []
        for node in placeholders(gm.graph):
            entry = context.captured.inputs[node.name]
            if entry.kind == "packed":
                found.append(packed[node.name])
            elif entry.name in substitutes:
                found.append(substitutes[entry.name])
            else:
                found.append(self.values[node.name])
        return found

    def dequantised(self, context: PassContext) -> dict[str, torch.Tensor]:
        """For quantised kernels, the weights they really compute with, as the model would hold them."""
        return dequantised_weights(context, self.state.store)


@dataclass(frozen=True)
class Checkpoint:
    """Where a run of the passes was after ``done`` of them. counted: by this graph alone. context: not to be edited."""

    done: int
    counted: RunCount
    context: PassContext


def _copied(context: PassContext) -> PassContext:
    """A context whose graph and collections are its own."""
    values = {f.name: getattr(context, f.name) for f in fields(context)}
    own: dict[str, Any] = {name: copy(v) for name, v in values.items() if isinstance(v, (dict, list))}
    captured = replace(context.captured, gm=copy_graph(context.captured.gm), inputs=dict(context.captured.inputs))
    return replace(context, captured=captured, **own)


class PassFailure(Exception):
    """A pass failed in a replay. error: what it raised. log: as in ``Replayed``."""

    def __init__(self, error: KtfxError, context: PassContext, log: str) -> None:
        super().__init__(str(error))
        self.error, self.context, self.log = error, context, log


@dataclass
class Replayed:
    """One run of the passes. log: the lines about what ran, as ``KTFX_BISECT_LIMIT`` prints them."""

    context: PassContext
    records: list[PassRecord]
    log: str

    @property
    def final(self) -> fx.GraphModule:
        return self.context.captured.gm

    @property
    def count(self) -> int:
        """How many rewrites were counted, run or not, with those of earlier graphs."""
        return self.context.count.rewrites


def tolerance_for(values: Any, context: PassContext) -> float:
    """The largest error that rounding explains, by the coarsest floating dtype among the values."""
    dtypes = [v.dtype for v in values if isinstance(v, torch.Tensor) and v.dtype in TOLERANCE]
    return max([*(TOLERANCE[d] for d in dtypes), quantisation_slack(context)], default=1e-4)
