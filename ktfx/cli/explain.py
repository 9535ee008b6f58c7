"""``ktfx explain``: what goes where and why, with bytes per device, before a single weight is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ktfx.cli import common
from ktfx.cli.models import ModelSource, find_model, meta_model
from ktfx.cli.placement import (
    PlacementRow,
    device_colours,
    path_template,
    placement_rows,
    placement_table,
    placement_tree,
    span_text,
)
from ktfx.text import human_bytes

if TYPE_CHECKING:
    from torch import nn

    from ktfx.budget import WeightPlan
    from ktfx.quantisation_errors import QuantisationError
    from ktfx.resolve import Resolution


@dataclass(frozen=True)
class Duplicate:
    """A weight of which more than one copy is kept: name, then (device, format, bytes) of each."""

    name: str
    copies: tuple[tuple[str, str, int], ...]


@dataclass(frozen=True)
class Explanation:
    """All that the command prints."""

    source: ModelSource
    model: nn.Module
    resolution: Resolution
    plans: list[WeightPlan]
    rows: list[PlacementRow]
    duplicates: list[Duplicate]


@common.guarded
def explain(
    rules: common.Rules,
    model: common.ModelOption = "demo",
    tree: Annotated[bool, typer.Option("--tree", help="A tree of modules instead of a table.")] = False,
    errors: Annotated[
        bool,
        typer.Option("--errors", help="Load the weights, round them as the rules say, and print how far they are off."),
    ] = False,
    as_json: common.Json = False,
    debug: common.Debug = False,
) -> None:
    """Say what goes where and why: a table, tree or JSON, with bytes per device.

    Nothing is loaded or moved: the model is built without weights (but for --errors). Equal layers are one row; a
    module that follows its parent has none, and its weights count there.
    """
    from ktfx.budget import plan_weights
    from ktfx.ops import load_ops
    from ktfx.resolve import resolve
    from ktfx.ruleset import load_ruleset

    ruleset = load_ruleset(rules)
    source = find_model(model)
    module = meta_model(source)
    resolution = resolve(ruleset, module)
    load_ops()
    plans = plan_weights(module, resolution)
    found = Explanation(source, module, resolution, plans, placement_rows(resolution, plans), duplicates(module, plans))
    measured = _measured(found) if errors else None
    if as_json:
        rounded = {} if measured is None else {"quantisation_errors": [asdict(e) for e in measured]}
        common.print_json({**_as_json(found), **rounded})
    else:
        _print(found, tree)
        if measured is not None:
            common.stdout().print(_error_table(measured, resolution))


def _measured(found: Explanation) -> list[QuantisationError]:
    from ktfx.cli.models import load_model
    from ktfx.quantisation_errors import planned_errors

    return list(planned_errors(load_model(found.source), found.resolution))


def _error_table(measured: list[QuantisationError], resolution: Resolution) -> RenderableType:
    """weight → format → relative error, equal layers in one row with the least and the largest."""
    if not measured:
        return Text("no weight is rounded")
    rows: dict[tuple[str, str], list[tuple[int | None, float]]] = {}
    for one in measured:
        layer = resolution.of(one.module).layer
        key = (path_template(one.name, layer, resolution), one.format)
        rows.setdefault(key, []).append((layer, one.error or 0.0))
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("weight", "kept as"):
        table.add_column(name, overflow="fold")
    table.add_column("relative error", justify="right", no_wrap=True)
    for (template, kept), found in rows.items():
        span = span_text([layer for layer, _ in found if layer is not None])
        least, most = min(e for _, e in found), max(e for _, e in found)
        text = f"{least:.3g}" if f"{least:.3g}" == f"{most:.3g}" else f"{least:.3g} to {most:.3g}"
        table.add_row(template.replace("*", span), kept, text)
    return Padding(table, (1, 0, 0, 0))


def duplicates(model: nn.Module, plans: list[WeightPlan]) -> list[Duplicate]:
    """Weights that will exist twice: in two formats, or on two devices (a phase, a tied embedding)."""
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    copies: dict[int, list[WeightPlan]] = {}
    for plan in plans:
        copies.setdefault(id(tensors[plan.name]), []).append(plan)
    return [
        Duplicate(found[0].name, tuple((p.device, p.format, p.nbytes) for p in found))
        for found in copies.values()
        if len(found) > 1
    ]


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _dtypes(model: nn.Module) -> list[str]:
    return sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})


def _device_bytes(found: Explanation) -> dict[str, tuple[int, int]]:
    """Device name → (bytes, number of weights), in the order that the rules name the devices."""
    names = [*found.resolution.ruleset.devices, *found.resolution.device_names()]
    total = {name: (0, 0) for name in names if name in found.resolution.device_names()}
    for plan in found.plans:
        nbytes, count = total.get(plan.device, (0, 0))
        total[plan.device] = (nbytes + plan.nbytes, count + 1)
    return total


def _as_json(found: Explanation) -> dict[str, Any]:
    from ktfx.devices import written_device

    ruleset = found.resolution.ruleset
    return {
        "model": {
            "name": found.source.name,
            "class": type(found.model).__name__,
            "layers": found.resolution.num_layers,
            "parameters": _parameters(found.model),
            "dtypes": _dtypes(found.model),
        },
        "rules": {"file": ruleset.origin.file, "dialect": ruleset.dialect, "default_device": ruleset.default_device},
        "devices": {
            name: {"stands_for": written_device(name, ruleset.devices), "bytes": nbytes, "weights": count}
            for name, (nbytes, count) in _device_bytes(found).items()
        },
        "placement": [row.to_json() for row in found.rows],
        "transfer_map": {str(layer): device for layer, device in found.resolution.transfer_map.items()},
        "duplicates": [
            {"name": d.name, "copies": [{"device": a, "format": f, "bytes": n} for a, f, n in d.copies]}
            for d in found.duplicates
        ],
        "warnings": _warnings(found),
    }


def _warnings(found: Explanation) -> list[str]:
    """The resolution's, and what the bytes do not say."""
    from ktfx.stored_experts import StoredExperts
    from ktfx.stored_linears import StoredLinear

    stored = getattr(getattr(found.model, "config", None), "quantization_config", None)
    if stored is None or any(isinstance(m, StoredLinear | StoredExperts) for m in found.model.modules()):
        return list(found.resolution.warnings)
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    note = f"the checkpoint is stored quantised ({method}); bytes are counted for {', '.join(_dtypes(found.model))}"
    return [*found.resolution.warnings, note]


def _print(found: Explanation, as_tree: bool) -> None:
    console = common.stdout()
    ruleset = found.resolution.ruleset
    names = found.resolution.device_names()
    console.print(
        Text.assemble(
            (type(found.model).__name__, "bold"),
            f"  {found.resolution.num_layers} layers, {_parameters(found.model) / 1e9:.3g} B parameters, "
            f"{', '.join(_dtypes(found.model))}, by {ruleset.origin.file}",
        ),
        soft_wrap=True,
    )
    console.print()
    if as_tree:
        console.print(placement_tree(found.rows, names, type(found.model).__name__))
    else:
        console.print(placement_table(found.rows, names, console.width))
    if found.resolution.transfer_map:
        steps = ", ".join(f"{device} from layer {layer}" for layer, device in found.resolution.transfer_map.items())
        console.print(Text(f"transfer_map: the residual stream runs on {steps}", "dim"))
    console.print()
    console.print(_device_table(found))
    for line in _duplicate_lines(found):
        console.print(line)
    for warning in _warnings(found):
        console.print(Text.assemble(("warning  ", "yellow"), warning))


def _device_table(found: Explanation) -> Table:
    from ktfx.devices import written_device

    colours = device_colours(found.resolution.device_names())
    devices = found.resolution.ruleset.devices
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("device", "stands for"):
        table.add_column(name)
    for name in ("tensors", "bytes"):
        table.add_column(name, justify="right")
    total = _device_bytes(found)
    for name, (nbytes, count) in total.items():
        table.add_row(Text(name, colours.get(name, "")), written_device(name, devices), str(count), human_bytes(nbytes))
    table.add_row(
        "together", "", str(sum(c for _, c in total.values())), human_bytes(sum(n for n, _ in total.values()))
    )
    return table


def _duplicate_lines(found: Explanation) -> list[Text]:
    """The weights that exist twice, equal layers in one line."""
    if not found.duplicates:
        return []
    extra = sum(sum(n for _, _, n in d.copies) - max(n for _, _, n in d.copies) for d in found.duplicates)
    text = f"{len(found.duplicates)} weights, {human_bytes(extra)} more than one copy of each"
    lines = [Text.assemble(("kept twice  ", "yellow"), text)]
    groups: dict[tuple[str, tuple[tuple[str, str, int], ...]], list[int]] = {}
    for one in found.duplicates:
        layer = found.resolution.of(one.name.rpartition(".")[0]).layer
        key = (path_template(one.name, layer, found.resolution), one.copies)
        groups.setdefault(key, []).extend([] if layer is None else [layer])
    for (template, copies), layers in groups.items():
        places = ", ".join(
            f"{device} {human_bytes(n)}" + ("" if f == "model" else f" ({f})") for device, f, n in copies
        )
        each = " each" if len(layers) > 1 else ""
        lines.append(Text(f"  {template.replace('*', span_text(layers))}: {places}{each}"))
    return lines
