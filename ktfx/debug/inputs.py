"""The tensors a graph was first called with, kept so that its programs can be run again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ktfx.pass_manager import packed_device
from ktfx.placed_tensor import PlacedTensor

if TYPE_CHECKING:
    from ktfx.pass_manager import PassContext
    from ktfx.state import GraphReport
    from ktfx.weights import WeightStore


def keeping_inputs(call: Callable[..., Any], report: GraphReport, context: PassContext) -> Callable[..., Any]:
    """``call``, which on its first run leaves its arguments in ``report.inputs``: placeholder name → value.

    Weights are kept by reference, what a call brings or writes to as a copy from before the call.
    """

    def first(*args: Any) -> Any:
        if report.inputs is None:
            report.inputs = argument_values(context, args)
        return call(*args)

    return first


def argument_values(context: PassContext, args: tuple[Any, ...], weights: bool = True) -> dict[str, Any]:
    """Placeholder name → its argument, on the logical device. weights: parameters and buffers too."""
    values: dict[str, Any] = {}
    for name, entry in context.captured.inputs.items():
        if entry.index < 0 or (not weights and entry.kind in ("parameter", "buffer")):
            continue
        value = args[entry.index]
        if isinstance(value, PlacedTensor):
            value = value.fetch()
        if isinstance(value, torch.Tensor):
            value = value.detach()
            if entry.kind == "input" or entry.mutated:
                value = value.clone()
        values[name] = value
    return values


def packed_values(context: PassContext, store: WeightStore) -> dict[str, torch.Tensor]:
    """The packed weights that the rewritten graph reads, on the logical device."""
    values: dict[str, torch.Tensor] = {}
    for name, weight in context.packed.items():
        tensors = store.packed(weight.request, packed_device(name, context))
        values[name] = tensors[weight.index].to(context.captured.logical)
    return values


def graph_arguments(names: list[str], values: Mapping[str, Any]) -> list[Any]:
    """The values of a graph's placeholders, in order."""
    return [values[name] for name in names]
