"""The entry point of ``torch.compile(model, backend="ktfx")``: Dynamo graph in, Program out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from ktfx.capture import capture
from ktfx.debug.inputs import keeping_inputs
from ktfx.debug.torch_trace import emit_records, listening
from ktfx.debug.watch import watch
from ktfx.options import CompileOptions, parse_options
from ktfx.pass_manager import PassContext, build_pipeline, run_pipeline
from ktfx.program.build import build_program
from ktfx.progress import report as report_progress
from ktfx.state import GraphReport, emit_warnings, forget_graphs, model_state
from ktfx.verify import verified


def compile_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    **unknown: Any,
) -> Callable[..., Any]:
    """What torch calls. ``options``: see ``CompileOptions``; ``mode`` is accepted from transformers' CompileConfig."""
    return compile_graph(gm, example_inputs, parse_options({**(options or {}), **unknown}, mode))


def compile_graph(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: CompileOptions, model: nn.Module | None = None
) -> Callable[..., Any]:
    """The way of the data, whole: capture, passes, partitions, program."""
    start = time.perf_counter()
    report_progress("capture")
    captured = capture(gm, example_inputs, model=model, query_input=options.query_input)
    state = model_state(captured.model, options, captured.logical)
    context = PassContext(captured, state.resolution, state.devices, state.logical_name, count=state.count)
    watched = watch(options, captured, state)
    captured_at = time.perf_counter()

    report_progress("passes")
    pipeline = build_pipeline(state.ruleset.passes)
    structured = listening()
    keep = options.verify or options.keep_graphs or structured
    with watched.stage("pass"):
        records = run_pipeline(pipeline, captured.gm, context, keep_graphs=keep)
    if structured:
        emit_records(records, context)
    passed_at = time.perf_counter()

    with torch.no_grad(), watched.stage("compile"):
        built = build_program(
            captured.gm,
            context,
            state.store,
            options.partition_backend,
            partial(report_progress, "compile"),
            state.log,
            options.cuda_graphs,
        )
    emit_warnings(context.warnings)
    report = GraphReport(
        phase=captured.phase,
        phase_reason=captured.phase_reason,
        records=records,
        warnings=list(context.warnings),
        built=built,
        runs=context.partitioning.runs,
        seconds={
            "capture": captured_at - start,
            "passes": passed_at - captured_at,
            "compile": time.perf_counter() - passed_at,
        },
        context=context if options.keep_graphs else None,
    )
    state.graphs.append(report)
    call = verified(built.program, records, context, state.store) if options.verify else built.program
    call = watched.calls(call, context)
    return keeping_inputs(call, report, context) if options.keep_graphs else call


# torch._dynamo.reset() calls this attribute.
compile_backend.reset = forget_graphs  # type: ignore[attr-defined]
