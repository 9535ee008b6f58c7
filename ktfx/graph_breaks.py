"""Graph breaks: harmless between layers, refused inside one (the layer's region could not be rewritten whole)."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import CodeType

from torch import nn

from ktfx.errors import CaptureError
from ktfx.roles import layer_of


def refuse_break_inside_layer(model: nn.Module, error: Exception) -> None:
    """CaptureError if Dynamo gave up at a line inside some decoder layer's forward; else nothing.

    error: Dynamo's ``Unsupported``; its ``real_stack`` holds the user's frames, outermost first.
    """
    if _eager_experts(model):
        raise CaptureError(
            "the model's experts do not trace", expected="experts that trace whole", mend=_break_mend(model)
        )
    layers = list(_layer_codes(model))
    for frame in getattr(error, "real_stack", None) or ():
        for path, code in layers:
            last = max((line for _, _, line in code.co_lines() if line), default=code.co_firstlineno)
            if frame.filename == code.co_filename and code.co_firstlineno <= (frame.lineno or 0) <= last:
                inner = error.real_stack[-1]  # type: ignore[attr-defined]
                raise CaptureError(
                    f"a graph break inside a decoder layer, at {inner.filename}:{inner.lineno}: {first_line(error)}",
                    module=path,
                    expected="layers that trace whole",
                    mend=_break_mend(model),
                ) from None


def refuse_piece_of_layer(model: nn.Module, path: str, code_name: str) -> None:
    """CaptureError if Dynamo compiles a piece of a layer alone (``path`` is the module it started from)."""
    if layer_of(path) is None:
        return
    is_whole_layer = layer_of(path.rpartition(".")[0]) is None and "resume" not in code_name
    if is_whole_layer:
        return
    raise CaptureError(
        "a graph break inside a decoder layer cut the layer into pieces",
        module=path,
        expected="a layer that traces whole",
        mend=_break_mend(model),
    )


def first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _layer_codes(model: nn.Module) -> Iterator[tuple[str, CodeType]]:
    """(path of the first such layer, code of its class's forward) for each class of decoder layer."""
    seen: set[type] = set()
    for path, module in model.named_modules():
        is_layer = layer_of(path) is not None and layer_of(path.rpartition(".")[0]) is None
        if is_layer and type(module) not in seen:
            seen.add(type(module))
            code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
            if code is not None:
                yield path, code


def _eager_experts(model: nn.Module) -> bool:
    return getattr(getattr(model, "config", None), "_experts_implementation", None) == "eager"


def _break_mend(model: nn.Module) -> str:
    if _eager_experts(model):
        return (
            "the model runs experts_implementation='eager', which breaks at nonzero(): call "
            "model.set_experts_implementation('grouped_mm')"
        )
    return "run once with TORCH_LOGS=graph_breaks to see why, and remove what breaks there (print, .item(), hooks)"
