"""What ktfx keeps of a model between compiles: its resolved rules, its weights, and the report of each graph."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ktfx.devices import DeviceMap, device_map, written_device
from ktfx.errors import KtfxWarning
from ktfx.options import CompileOptions
from ktfx.pack_cache import PackCache
from ktfx.pass_manager import PassContext, PassRecord, RunCount, build_pipeline
from ktfx.program.build import BuiltProgram
from ktfx.program.program import CallLog
from ktfx.resolve import Resolution, resolve
from ktfx.ruleset import Ruleset, load_ruleset
from ktfx.unbuilt import check_ops
from ktfx.weights import WeightStore

if TYPE_CHECKING:
    from ktfx.quantisation_errors import QuantisationError


@dataclass
class GraphReport:
    """One compiled graph: what the passes did and what came out.

    context, inputs: only with ``keep_graphs``: the passes' context, and the first call's arguments by placeholder name.
    """

    phase: str
    phase_reason: str
    records: list[PassRecord]
    warnings: list[str]
    built: BuiltProgram
    runs: tuple[str, ...]
    seconds: dict[str, float]
    context: PassContext | None = None
    inputs: dict[str, Any] | None = None

    def transfers(self) -> list[tuple[str, str, int]]:
        """(from, to, bytes) of each transfer step."""
        from ktfx.program.program import Transfer

        return [(s.source_name, s.target_name, s.nbytes) for s in self.built.program.steps if isinstance(s, Transfer)]

    def partitions(self) -> Counter[str]:
        """Compile units per device name."""
        return Counter(u.device for u in self.built.units)


@dataclass
class ModelState:
    """A model under one set of options. count: the passes and rewrites that its graphs have counted so far."""

    ruleset: Ruleset
    resolution: Resolution
    devices: DeviceMap
    logical_name: str
    store: WeightStore
    options: CompileOptions
    log: CallLog = field(default_factory=CallLog)
    count: RunCount = field(default_factory=RunCount)
    graphs: list[GraphReport] = field(default_factory=list)

    def quantisation_errors(self) -> list[QuantisationError]:
        """For each weight that a kernel rounded, how far it is from the model's own; measured when asked for."""
        from ktfx.quantisation_errors import errors_in

        return errors_in(self.store)


# Weak: a model that is dropped takes its state along. Keyed by the options, since one model may be compiled twice.
_STATES: weakref.WeakKeyDictionary[nn.Module, dict[str, ModelState]] = weakref.WeakKeyDictionary()


def model_state(model: nn.Module, options: CompileOptions, logical: torch.device) -> ModelState:
    """The state of a model under these options; resolved and checked at the first request."""
    states = _STATES.setdefault(model, {})
    key = f"{options.key}|{logical}"
    state = states.get(key)
    if state is None:
        ruleset = load_ruleset(options.rules if options.rules is not None else default_rules(model))
        resolution = resolve(ruleset, model)
        devices = device_map(ruleset, options.simulate)
        logical_name = name_of_logical(ruleset, logical)
        from ktfx.budget import check_budget
        from ktfx.ops import load_ops

        load_ops()
        build_pipeline(ruleset.passes)  # a pass that does not exist is said now, not after tracing
        check_budget(model, resolution, devices, options.memory, logical_name)
        unbuilt = check_ops(resolution)
        cache = PackCache(Path(options.pack_cache)) if options.pack_cache is not None else None
        store = WeightStore(model, devices, logical_name, cache)
        state = states[key] = ModelState(ruleset, resolution, devices, logical_name, store, options)
        emit_warnings([*resolution.warnings, *unbuilt])
    return state


def states_of(model: nn.Module) -> list[ModelState]:
    """Every state of a model, newest last."""
    return list(_STATES.get(model, {}).values())


def forget(model: nn.Module) -> None:
    """Drop what is kept of a model (its copies of weights with it)."""
    _STATES.pop(model, None)


def forget_graphs() -> None:
    """Drop the reports of all graphs; ``torch._dynamo.reset()`` calls it."""
    for states in _STATES.values():
        for state in states.values():
            state.graphs.clear()


def default_rules(model: nn.Module) -> str:
    """The shipped rule file for the model's type and the GPUs that are there."""
    from ktfx.rules_index import shipped_rules_for

    config = getattr(model, "config", None)
    model_type = str(getattr(config, "model_type", "") or "")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return shipped_rules_for(model_type, gpus, float(sum(p.numel() for p in model.parameters())))


def name_of_logical(ruleset: Ruleset, logical: torch.device) -> str:
    """The name that the rules give the device inputs come from: ``host`` where ``host: cpu`` is declared."""
    plain = "cpu" if logical.type == "cpu" else f"{logical.type}:{logical.index or 0}"
    for name in ruleset.devices:
        if written_device(name, ruleset.devices) == plain:
            return name
    return plain


def emit_warnings(texts: tuple[str, ...] | list[str]) -> None:
    """Each text as a ``KtfxWarning``."""
    import warnings

    for text in texts:
        warnings.warn(text, KtfxWarning, stacklevel=2)


def report_lines(state: ModelState) -> list[dict[str, Any]]:
    """One dictionary for each compiled graph (``--json``)."""
    return [
        {
            "phase": g.phase,
            "phase_reason": g.phase_reason,
            "runs": list(g.runs),
            "partitions": dict(g.partitions()),
            "units": len(g.built.units),
            "distinct_units": len(g.built.distinct),
            "transfers": [{"from": a, "to": b, "bytes": n} for a, b, n in g.transfers()],
            "transfer_bytes": sum(n for _, _, n in g.transfers()),
            "seconds": g.seconds,
            "warnings": g.warnings,
            "passes": [{"name": r.name, "seconds": r.seconds, "rewrites": len(r.rewrites)} for r in g.records],
        }
        for g in state.graphs
    ]
