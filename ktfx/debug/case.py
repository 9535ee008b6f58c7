"""A captured graph with all that its passes, its compile and its run need, so that a failure comes back without the
model: the graph, the module tree without weights, the rules, and the values it was called with or made-up ones.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from ktfx.capture import Captured
from ktfx.debug.failure import Failure, failure_from
from ktfx.debug.graph_loader import load_graph
from ktfx.debug.module_tree import from_bytes
from ktfx.debug.runtime import Input, made_up, register_ops
from ktfx.debug.snapshot import InputLine, Snapshot, snapshot
from ktfx.devices import device_map, is_host, written_device
from ktfx.errors import KtfxWarning, OptionError
from ktfx.graph import GraphInput, placeholders, tensor_bytes
from ktfx.pass_manager import PassContext, build_pipeline, copy_graph, run_pipeline
from ktfx.program.build import build_program
from ktfx.resolve import resolve
from ktfx.ruleset import Ruleset, load_ruleset
from ktfx.state import name_of_logical
from ktfx.text import human_bytes
from ktfx.verify import verified
from ktfx.weights import WeightStore

VERSION = 1
GRAPH, MODULES, RULES, INPUTS = "graph.json", "modules.pkl", "rules.yaml", "inputs.pt"
STAGES = ("pass", "compile", "run")
_SMALL = 256
_MOST_MADE_UP_BYTES = 4 * 1024**3


@dataclass(frozen=True)
class Case:
    """One graph of one model under one set of rules.

    captured: the graph before the first pass; its model has no weights. rules: as plain data. stage: how far to go:
    ``pass`` runs the passes, ``compile`` builds the program too, ``run`` calls it. backend: what compiles partitions.
    values: arguments by placeholder name; those that are missing are made up, the same each time.
    """

    captured: Captured
    rules: Any
    stage: str = "pass"
    simulate: str | Mapping[str, str] | None = None
    backend: str = "inductor"
    verify: bool = False
    values: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nodes(self) -> int:
        """How many calls the graph holds."""
        return sum(n.op == "call_function" for n in self.captured.gm.graph.nodes)

    def with_graph(self, gm: fx.GraphModule, **changes: Any) -> Case:
        """The case over another graph; ``changes`` are fields of ``Captured``."""
        return replace(self, captured=replace(self.captured, gm=gm, **changes))


# ---- running


def run_case(case: Case) -> Failure | None:
    """The passes, the compile and the run as far as the case's stage; the failure, or None."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", KtfxWarning)
        try:
            _run(case)
        except OptionError:
            raise
        except Exception as error:
            return failure_from(error)
    return None


def _run(case: Case) -> None:
    from ktfx.ops import load_ops

    load_ops()
    ruleset = load_ruleset(case.rules)
    model = case.captured.model
    _fit_weights(case)
    resolution = resolve(ruleset, model)
    devices = device_map(ruleset, _existing(ruleset, case.simulate))
    captured = replace(
        case.captured,
        gm=copy_graph(case.captured.gm),
        inputs=dict(case.captured.inputs),
        writes=list(case.captured.writes),
    )
    context = PassContext(captured, resolution, devices, name_of_logical(ruleset, captured.logical))
    records = run_pipeline(build_pipeline(ruleset.passes), captured.gm, context, keep_graphs=case.verify)
    if case.stage == "pass":
        return
    store = WeightStore(model, devices, context.logical_name)
    program = build_program(captured.gm, context, store, case.backend).program
    if case.stage == "compile":
        return
    call = verified(program, records, context, store) if case.verify else program
    call(*arguments(case))


def _existing(ruleset: Ruleset, simulate: Any) -> Any:
    """``simulate``, or the cpu for every device where this machine lacks one of the rules' devices."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    written = [written_device(n, ruleset.devices) for n in ruleset.device_origins if not is_host(n, ruleset.devices)]
    lacking = any(int(w.partition(":")[2] or 0) >= count for w in written)
    return "cpu" if simulate is None and lacking else simulate


def arguments(case: Case) -> list[Any]:
    """What the program is called with, in Dynamo's order; the weights are the model's."""
    entries = sorted((e.index, n) for n, e in case.captured.inputs.items() if e.index >= 0)
    found: list[Any] = [None] * (entries[-1][0] + 1 if entries else 0)
    by_name = {n.name: n for n in placeholders(case.captured.gm.graph)}
    for index, name in entries:
        entry = case.captured.inputs[name]
        if entry.kind in ("parameter", "buffer"):
            found[index] = _owner(case.captured.model, entry.name)[1]
        else:
            value = value_of(case, by_name[name])
            found[index] = value.clone() if isinstance(value, torch.Tensor) else value
    return found


def value_of(case: Case, node: fx.Node) -> Any:
    """The value of a placeholder: saved, or made up by its name in the right form."""
    entry = case.captured.inputs[node.name]
    val = node.meta["val"]
    if node.name in case.values:
        saved = case.values[node.name]
        if not isinstance(val, torch.Tensor):
            return saved
        if isinstance(saved, torch.Tensor) and saved.shape == val.shape:
            return saved.to(val.device)
    if node.name in case.captured.constants:
        return case.captured.constants[node.name]
    if not isinstance(val, torch.Tensor):
        return int(val)
    dtype = str(val.dtype).removeprefix("torch.")
    return made_up(Input(entry.kind, entry.name, dtype, tuple(int(s) for s in val.shape))).to(val.device)


def _fit_weights(case: Case) -> None:
    """Give the model's parameters the graph's shapes, and data where the stage needs them."""
    weights = [
        n for n in placeholders(case.captured.gm.graph) if case.captured.inputs[n.name].kind in ("parameter", "buffer")
    ]
    real = case.stage != "pass"
    size = sum(tensor_bytes(n.meta["val"]) for n in weights if n.name not in case.values)
    if real and size > _MOST_MADE_UP_BYTES:
        raise OptionError(
            f"making up the weights that the graph reads would take {human_bytes(size)}",
            expected=f"at most {human_bytes(_MOST_MADE_UP_BYTES)}",
            mend="write the repro with a smaller model, or with its tensors (KTFX_REPRO_INPUTS=1)",
        )
    for node in weights:
        name, val = case.captured.inputs[node.name].name, node.meta["val"]
        owners, own = _owner(case.captured.model, name)
        leaf = name.rpartition(".")[2]
        if own is None or own.shape != val.shape or (real and own.device.type == "meta"):
            data = value_of(case, node) if real else torch.empty(val.shape, dtype=val.dtype, device="meta")
            parameter = case.captured.inputs[node.name].kind == "parameter"
            owners[leaf] = nn.Parameter(data, requires_grad=False) if parameter else data


def _owner(model: nn.Module, name: str) -> tuple[dict[str, Any], Any]:
    """The dictionary that holds a parameter or buffer, and its value."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    for own in (module._parameters, module._buffers):
        if leaf in own:
            return own, own[leaf]  # type: ignore[return-value]
    return module._parameters, None  # type: ignore[return-value]


# ---- writing and reading


def case_text(case: Case) -> str:
    """``graph.json``: everything but the module tree, the rules and tensors that are not small."""
    captured = case.captured
    shot = snapshot(captured.gm, captured.inputs)
    strides = {}
    for node in placeholders(captured.gm.graph):
        val = node.meta.get("val")
        if isinstance(val, torch.Tensor) and not val.is_contiguous():
            strides[node.name] = [_hint(s) for s in val.stride()]
    small = {n: _plain(v) for n, v in {**captured.constants, **case.values}.items() if _is_small(v)}
    data = {
        "ktfx_graph": VERSION,
        "phase": captured.phase,
        "phase_reason": captured.phase_reason,
        "prefix": captured.prefix,
        "logical": str(captured.logical),
        "stage": case.stage,
        "simulate": case.simulate,
        "backend": case.backend,
        "verify": case.verify,
        "writes": captured.writes,
        "strides": strides,
        "values": small,
        "indexes": {n: e.index for n, e in captured.inputs.items()},
        **shot.to_json(),
    }
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


def saved_tensors(case: Case, every: bool) -> dict[str, torch.Tensor]:
    """What ``inputs.pt`` holds: the tensors that a graph holds itself; with ``every``, all that it was called with."""
    found = dict(case.captured.constants)
    if every:
        found |= {n: v.detach().cpu() for n, v in case.values.items() if isinstance(v, torch.Tensor)}
    return {n: t for n, t in found.items() if every or not _is_small(t)}


def _is_small(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return not value.dtype.is_floating_point and not value.dtype.is_complex and value.numel() <= _SMALL
    return isinstance(value, int)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor) else int(value)


def _hint(size: Any) -> int:
    return int(size.node.hint or 1) if isinstance(size, torch.SymInt) else int(size)


def load_case(folder: Path) -> Case:
    """The case in a directory that holds ``graph.json``. OptionError if it is not one of this version."""
    import yaml

    try:
        data = json.loads((folder / GRAPH).read_text(encoding="utf-8"))
        if data.get("ktfx_graph") != VERSION:
            raise ValueError(f"version {data.get('ktfx_graph')!r}, not {VERSION}")
        model = from_bytes((folder / MODULES).read_bytes())
        rules = yaml.safe_load((folder / RULES).read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise OptionError(
            f"{folder} holds no graph that can be run again: {error}",
            expected=f"a directory with {GRAPH}, {MODULES} and {RULES}",
            mend="KTFX_REPRO_DIR=DIR writes one when a pass, a compile or a run fails; `ktfx repro` does too",
        ) from None
    shot = Snapshot.from_json(data)
    register_ops(sorted({n.text.partition("= ")[2].partition(".")[0] for n in shot.nodes}))
    saved: dict[str, Any] = {}
    if (folder / INPUTS).is_file():
        saved = dict(torch.load(folder / INPUTS, weights_only=True))
    values = {i.name: _value(i, data["values"][i.name]) for i in shot.inputs if i.name in data["values"]} | saved
    logical = torch.device(data["logical"])
    devices = {}
    if logical.type == "cuda" and not torch.cuda.is_available():
        devices, logical = {str(logical): torch.device("cpu")}, torch.device("cpu")
    strides = {name: tuple(s) for name, s in data["strides"].items()}
    gm = load_graph(shot, logical, strides, devices)
    inputs = {i.name: GraphInput(i.kind, i.source, data["indexes"][i.name], i.mutated, i.home) for i in shot.inputs}
    writes = [(int(position), str(name)) for position, name in data["writes"]]
    captured = Captured(
        gm=gm,
        inputs=inputs,
        writes=writes,
        model=model,
        prefix=data["prefix"],
        phase=data["phase"],
        phase_reason=data["phase_reason"],
        logical=logical,
        num_outputs=len(_outputs(gm)) - len(writes),
        constants={n: values[n] for n, e in inputs.items() if e.kind == "constant" and n in values},
    )
    return Case(captured, rules, data["stage"], data["simulate"], data["backend"], data["verify"], values)


def _outputs(gm: fx.GraphModule) -> Any:
    return next(iter(reversed(gm.graph.nodes))).args[0]


def _value(entry: InputLine, value: Any) -> Any:
    if entry.dtype == "int":
        return int(value)
    return torch.tensor(value, dtype=getattr(torch, entry.dtype)).reshape(entry.shape)


def main(program: str) -> None:
    """What ``run.py`` of a repro calls: run the case beside it; the failure's traceback and exit code 1, or 0."""
    import sys

    case = load_case(Path(program).resolve().parent)
    failure = run_case(case)
    if failure is None:
        print(f"nothing failed: {case.nodes} nodes, up to the stage {case.stage!r}")
        return
    print(failure.trace, end="")
    sys.exit(1)


def case_of(captured: Captured, rules: Any, **about: Any) -> Case:
    """A case over a copy of a captured graph, made before the passes edit it."""
    own = replace(captured, gm=copy_graph(captured.gm), inputs=dict(captured.inputs), writes=list(captured.writes))
    return Case(own, rules, **about)
