"""Each pass's graphs into the log that ``TORCH_TRACE`` asks for, so that ``tlparse`` lists them under their compile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch._logging import trace_structured
from torch._logging._internal import trace_log

if TYPE_CHECKING:
    from ktfx.pass_manager import PassContext, PassRecord


def listening() -> bool:
    """Whether a structured trace is being written. Dynamo has logged by now, so a handler without a folder is gone."""
    return bool(trace_log.handlers)


def emit_records(records: Sequence[PassRecord], context: PassContext) -> None:
    """An artifact for the captured graph and for the graph after each pass: ``ktfx_prefill_002_rewrite_experts``."""
    from ktfx.debug.trace_dir import folder_name, title_of

    for position, record in enumerate(records):
        if position == 0 and record.graph_before is not None:
            _emit(f"ktfx_{context.phase}_000_captured", record.graph_before, context, f"{context.phase}: as captured")
        if record.graph_after is not None:
            name = f"ktfx_{context.phase}_{folder_name(position + 1, record.name)}"
            _emit(name, record.graph_after, context, title_of(context.phase, record.name, "after"))


def _emit(name: str, gm: object, context: PassContext, title: str) -> None:
    from torch import fx

    from ktfx.debug.dump import packed_texts, program_text
    from ktfx.debug.snapshot import snapshot

    assert isinstance(gm, fx.GraphModule)
    shot = snapshot(gm, context.captured.inputs)
    text = program_text(shot, title, packed_texts(shot, context))
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=lambda: text)
