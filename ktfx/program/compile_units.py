"""Units → callables. Equal units are compiled once; Inductor by default, plain FX for debugging."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ktfx.errors import OptionError, PassError
from ktfx.ops.define import function_of
from ktfx.program.units import UnitGraph
from ktfx.text import near

UnitFunction = Callable[..., Sequence[Any]]


@dataclass
class CompiledUnit:
    """A compiled unit and what it cost. nodes: how many nodes were compiled; shared: how many units use it."""

    function: UnitFunction
    key: str
    seconds: float
    nodes: int
    shared: int = 1


def _inductor(unit: UnitGraph) -> UnitFunction:
    """Inductor, inside Dynamo's tracing context: ``from_example_inputs`` loses ranges of sizes (torch 2.11, 2.13)."""
    if _is_host_call(unit):
        return _direct(unit)
    artifact = torch._inductor.standalone_compile(
        unit.gm, unit.fakes, dynamic_shapes="from_tracing_context", options={"config_patches": {}}
    )
    return artifact.__call__


def _eager(unit: UnitGraph) -> UnitFunction:
    """The unit's own nodes, one after another."""
    unit.gm.recompile()
    return unit.gm.forward


def _is_host_call(unit: UnitGraph) -> bool:
    """Whether the unit does nothing but call ktfx's own functions on the host: there is nothing to compile in it."""
    calls = [node for node in unit.gm.graph.nodes if node.op not in ("placeholder", "output")]
    on_host = all(fake.device.type == "cpu" for fake in unit.fakes if isinstance(fake, torch.Tensor))
    return on_host and bool(calls) and all(function_of(node.target) is not None for node in calls)


def _direct(unit: UnitGraph) -> UnitFunction:
    """The functions behind the unit's ops, called as they are.

    What Inductor and the dispatcher put around one call of host experts costs 0.3 ms where that call's weights have
    just passed through the caches (two AVX-512 cores), as much as the experts themselves on 16 cores.
    """
    gm = fx.GraphModule(unit.gm, copy.deepcopy(unit.gm.graph))
    for node in gm.graph.nodes:
        node.target = function_of(node.target) or node.target
    gm.recompile()
    return gm.forward


BACKENDS: dict[str, Callable[[UnitGraph], UnitFunction]] = {"inductor": _inductor, "eager": _eager}


def compile_units(
    units: Sequence[UnitGraph], backend: str, progress: Callable[[int, int], None] | None = None
) -> list[CompiledUnit]:
    """A compiled unit for each, equal ones shared. ``progress(done, distinct)`` is called after each compile."""
    if backend not in BACKENDS:
        raise OptionError(
            f"unknown partition_backend {backend!r}{near(backend, BACKENDS)}", expected="one of " + ", ".join(BACKENDS)
        )
    compiled: dict[str, CompiledUnit] = {}
    distinct = len({u.key for u in units})
    result: list[CompiledUnit] = []
    for unit in units:
        found = compiled.get(unit.key)
        if found is not None:
            found.shared += 1
            result.append(found)
            continue
        nodes = len(unit.gm.graph.nodes)
        start = time.perf_counter()
        try:
            function = BACKENDS[backend](unit)
        except Exception as error:
            raise PassError(
                f"{backend} could not compile a partition of {nodes} nodes: {type(error).__name__}: {error}",
                mend="options={'partition_backend': 'eager'} runs it uncompiled",
            ) from error
        found = compiled[unit.key] = CompiledUnit(function, unit.key, time.perf_counter() - start, nodes)
        result.append(found)
        if progress is not None:
            progress(len(compiled), distinct)
    return result
