"""A resolution as a table for people: equal layers are one row; children that follow their parent have none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from ktfx.text import human_bytes

if TYPE_CHECKING:
    from ktfx.budget import WeightPlan
    from ktfx.resolve import ModulePlacement, PhasePlacement, Resolution

REST = "(everything else)"
_NAMED_OUTSIDE = 8
_MODULE_WIDTH = 31  # what the paths get at least
_WIDE = 100  # from here on a console has room for both phases beside each other
COLOURS = ("cyan", "magenta", "green", "blue", "bright_red", "bright_cyan", "bright_magenta", "bright_green")


@dataclass
class PlacementRow:
    """Modules that are placed alike and for the same reason.

    label: ``model.layers.0-3.mlp.experts``. paths: the modules themselves. leaves: the last names of siblings that
    share the row. nbytes: their weights, with what lies inside them and has no row of its own; both copies where the
    phases differ.
    """

    label: str
    first: ModulePlacement
    why: str
    paths: list[str] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    leaves: list[str] = field(default_factory=list)
    nbytes: int = 0

    @property
    def same_in_both_phases(self) -> bool:
        return self.first.prefill == self.first.generate

    def to_json(self) -> dict[str, Any]:
        first = self.first
        rule = first.rule
        return {
            "modules": self.label,
            "paths": self.paths,
            "role": first.role,
            "why": self.why,
            "reason": first.reason,
            "rule": rule.number if rule else None,
            "file": rule.origin.file if rule else None,
            "line": rule.origin.line or None if rule else None,
            "prefill": _phase_json(first.prefill),
            "generate": _phase_json(first.generate),
            "out_device": first.out_device,
            "bytes": self.nbytes,
        }


def _phase_json(place: PhasePlacement) -> dict[str, Any]:
    return {"device": place.device, "op": place.op, "weights": place.weights}


def placement_rows(resolution: Resolution, plans: Iterable[WeightPlan] = ()) -> list[PlacementRow]:
    """The rows, in the order of the model's modules. A module gets one if it is not placed as its parent is."""
    plans = list(plans)
    weighted = {plan.module for plan in plans}
    named = _always_named(resolution, weighted)
    rows: dict[tuple[object, ...], PlacementRow] = {}
    row_of: dict[str, PlacementRow] = {}
    for path, placement in resolution.placements.items():
        parent = resolution.placements[path.rpartition(".")[0]] if path else None
        if parent is not None and path not in named and not _has_own_row(placement, parent, path in weighted):
            row_of[path] = row_of[parent.module]
            continue
        key = (path_template(path, placement.layer, resolution), *_sameness(placement))
        if key not in rows:
            rows[key] = PlacementRow(path, placement, why(placement))
        row = row_of[path] = rows[key]
        row.paths.append(path)
        if placement.layer is not None:
            row.layers.append(placement.layer)
    for row in rows.values():
        row.label = path_template(row.paths[0], row.first.layer, resolution, span_text(row.layers)) or REST
    for plan in plans:
        row_of[plan.module].nbytes += plan.nbytes
    # The root says something only if weights, or modules without a row, follow it.
    found = list(rows.values())
    if found and found[0].paths == [""] and not found[0].nbytes and len(found) > 1:
        found = found[1:]
    return _siblings_joined(found)


def _sameness(placement: ModulePlacement) -> tuple[object, ...]:
    """Equal for modules that are placed alike, for the same reason."""
    return (placement.prefill, placement.generate, id(placement.rule), placement.reason, placement.out_device)


def _has_own_row(placement: ModulePlacement, parent: ModulePlacement, has_weights: bool) -> bool:
    if (placement.prefill.device, placement.generate.device) != (parent.prefill.device, parent.generate.device):
        return True
    if placement.reason == "rule":
        same_ops = all(
            operator_text(placement.at(phase)) == operator_text(parent.at(phase)) for phase in ("prefill", "generate")
        )
        return not same_ops or (has_weights and placement.rule is not parent.rule)
    return placement.reason == "layers" and parent.reason == "default"


def _siblings_joined(rows: list[PlacementRow]) -> list[PlacementRow]:
    """Rows of one parent that are placed alike become one: ``mlp.{gate_proj, up_proj}``."""
    parents = {path.rpartition(".")[0] for row in rows for path in row.paths}
    joined: dict[tuple[object, ...], PlacementRow] = {}
    for row in rows:
        above, dot, leaf = row.label.rpartition(".")
        inner = any(path in parents for path in row.paths)
        key = (above, tuple(row.layers), *_sameness(row.first)) if dot and leaf and not inner else (row.label, id(row))
        if key in joined:
            other = joined[key]
            other.leaves.append(leaf)
            other.paths += row.paths
            other.nbytes += row.nbytes
            other.label = above + ".{" + ", ".join(other.leaves) + "}"
        else:
            joined[key] = row
            row.leaves = [leaf]
    return list(joined.values())


def _always_named(resolution: Resolution, weighted: set[str]) -> set[str]:
    """Modules that get a row though they may follow the root: the layers, and the few with weights outside them."""
    placements = resolution.placements.values()
    layers = {p.module for p in placements if p.layer is not None and p.module == resolution.layer_path(p.layer)}
    outside = {p.module for p in placements if p.module in weighted and p.layer is None}
    return layers | (outside if len(outside) <= _NAMED_OUTSIDE else set())


def path_template(path: str, layer: int | None, resolution: Resolution, number: str = "*") -> str:
    """The path with the number of its decoder layer replaced."""
    if layer is None:
        return path
    prefix = resolution.layer_path(layer)
    return prefix.removesuffix(str(layer)) + number + path[len(prefix) :] if path.startswith(prefix) else path


def span_text(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] → ``0-2,5``."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def why(placement: ModulePlacement) -> str:
    """The reason in words: ``rule 2, line 11``, ``layers:``, ``default``, ``as model.layers.0.mlp``."""
    if placement.reason == "rule" and placement.rule is not None:
        line = placement.rule.origin.line
        return placement.rule.label + (f", line {line}" if line else "")
    if placement.reason == "inherited":
        return f"as {placement.inherited_from}"
    return "layers:" if placement.reason == "layers" else placement.reason


def operator_text(place: PhasePlacement) -> str:
    return (place.op or "aten") + (f" ({place.weights})" if place.weights and place.weights != "model" else "")


def device_colours(names: Iterable[str]) -> dict[str, str]:
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def placement_table(
    rows: Sequence[PlacementRow], devices: Sequence[str], width: int, title: str | None = None
) -> RenderableType:
    """module → why → operator → device; one column a phase where they differ anywhere. width: of the console."""
    colours = device_colours(devices)
    differ = any(not row.same_in_both_phases for row in rows)
    if differ and width < _WIDE:
        return Group(*([Text(title, "bold")] if title else []), *(_block(row, colours) for row in rows))
    table = Table(title=title, title_justify="left", title_style="bold", box=None, header_style="dim", pad_edge=False)
    labels = [_table_label(row) for row in rows]
    longest = max((len(line) for label in labels for line in label.splitlines()), default=0)
    table.add_column("module", overflow="fold", min_width=min(longest, _MODULE_WIDTH))
    for name in ("rule", *(("prefill", "generate") if differ else ("operator", "device"))):
        table.add_column(name, overflow="fold")
    table.add_column("weights", justify="right", no_wrap=True)
    for row, label in zip(rows, labels, strict=True):
        generate = row.first.generate
        if differ:
            same = row.same_in_both_phases
            second = Text("the same", "dim") if same else _place_text(generate, colours)
            cells = [_place_text(row.first.prefill, colours), second]
            _add_out_device(cells[0] if same else second, row)
        else:
            cells = [Text(operator_text(generate)), Text(generate.device, colours.get(generate.device, ""))]
            _add_out_device(cells[1], row)
        table.add_row(Text(label), Text(row.why, "dim"), *cells, human_bytes(row.nbytes) if row.nbytes else "")
    return table


def _block(row: PlacementRow, colours: dict[str, str]) -> RenderableType:
    """A row on lines of its own, for a console too narrow for both phases beside each other."""
    line = Text()
    if row.same_in_both_phases:
        line.append_text(_place_text(row.first.generate, colours))
    else:
        line.append("prefill ", "dim").append_text(_place_text(row.first.prefill, colours))
        line.append(", generate ", "dim").append_text(_place_text(row.first.generate, colours))
    _add_out_device(line, row)
    line.append(f"  {row.why}", "dim").append(f"  {human_bytes(row.nbytes)}" if row.nbytes else "")
    return Group(Text(row.label), Padding(line, (0, 0, 0, 4)))


def _add_out_device(text: Text, row: PlacementRow) -> None:
    if row.first.out_device and row.first.out_device != row.first.generate.device:
        text.append(f", then to {row.first.out_device}", "dim")


def _table_label(row: PlacementRow) -> str:
    """The label, siblings on a line of their own: long paths then break where they should."""
    return row.label.replace(".{", ".\n  {") if len(row.leaves) > 1 else row.label


def _place_text(place: PhasePlacement, colours: dict[str, str]) -> Text:
    return Text.assemble(operator_text(place), " on ", (place.device, colours.get(place.device, "")))


def placement_tree(rows: Sequence[PlacementRow], devices: Sequence[str], root: str) -> Tree:
    """The same rows as a tree of module paths."""
    colours = device_colours(devices)
    tree = Tree(Text(root, "bold"), guide_style="dim")
    branches: dict[str, tuple[Tree, PlacementRow | None]] = {"": (tree, None)}
    for row in rows:
        parent, above, leaf = _parent(row, branches)
        if above is not None and above.layers != row.layers:
            leaf = f"[{span_text(row.layers)}] {leaf}"
        line = Text.assemble((leaf, "dim" if row.label == REST else ""), "  ")
        if row.same_in_both_phases:
            line.append_text(_place_text(row.first.generate, colours))
        else:
            line.append("prefill ", "dim").append_text(_place_text(row.first.prefill, colours))
            line.append("  generate ", "dim").append_text(_place_text(row.first.generate, colours))
        line.append(f"  {row.why}", "dim")
        if row.nbytes:
            line.append(f"  {human_bytes(row.nbytes)}", "dim")
        branch = parent.add(line)
        for path in row.paths:
            branches.setdefault(path, (branch, row))
    return tree


def _parent(
    row: PlacementRow, branches: dict[str, tuple[Tree, PlacementRow | None]]
) -> tuple[Tree, PlacementRow | None, str]:
    """The branch of the nearest module above a row, its row, and the path below it."""
    path = row.paths[0]
    if row.label == REST:
        return *branches[""], REST
    above = path.rpartition(".")[0]
    while above and above not in branches:
        above = above.rpartition(".")[0]
    tree, parent = branches[above]
    if not above or parent is None or parent.label == REST:
        return tree, None, row.label
    below = path[len(above) + 1 :]
    if len(row.leaves) > 1:
        below = below.removesuffix(row.leaves[0]) + "{" + ", ".join(row.leaves) + "}"
    return tree, parent, below
