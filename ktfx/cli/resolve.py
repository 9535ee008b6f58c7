"""``ktfx resolve``: the placement of every module, one line or one JSON entry each."""

from __future__ import annotations

from rich.text import Text

from ktfx.cli import common
from ktfx.cli.models import find_model, meta_model
from ktfx.cli.placement import device_colours, operator_text, why


@common.guarded
def resolve(
    rules: common.Rules,
    model: common.ModelOption = "demo",
    as_json: common.Json = False,
    debug: common.Debug = False,
) -> None:
    """Print where every module goes, by which rule. No weights are needed or loaded.

    `ktfx explain` says the same in a few lines, with bytes.
    """
    from ktfx.resolve import resolve as resolution_of
    from ktfx.ruleset import load_ruleset

    ruleset = load_ruleset(rules)
    resolution = resolution_of(ruleset, meta_model(find_model(model)))
    if as_json:
        common.print_json(resolution.to_json())
        return
    console = common.stdout()
    colours = device_colours(resolution.device_names())
    width = max(len(path) for path in resolution.placements)
    for path, placement in resolution.placements.items():
        line = Text((path or "(the model)").ljust(width + 2))
        phases = (
            [placement.generate] if placement.prefill == placement.generate else [placement.prefill, placement.generate]
        )
        for name, place in zip(("prefill", "generate") if len(phases) > 1 else ("",), phases, strict=True):
            line.append(f"{name} " if name else "", "dim").append(place.device, colours.get(place.device, ""))
            line.append(f" {operator_text(place)}  ")
        line.append(why(placement), "dim")
        console.print(line, soft_wrap=True)
    for warning in resolution.warnings:
        common.stderr().print(Text.assemble(("warning  ", "yellow"), warning))
