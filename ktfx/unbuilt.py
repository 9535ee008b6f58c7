"""Ops that a rule may name and that no pass runs yet: refused where a module is named, said where files are generic."""

from __future__ import annotations

from ktfx.errors import PlacementError
from ktfx.op_names import family
from ktfx.resolve import PHASES, ModulePlacement, Resolution

# Families with a pass that puts their kernels in by a module's rule (fused norms and the like come by `passes:`).
_REWRITTEN = frozenset({"experts"})


def check_ops(resolution: Resolution) -> list[str]:
    """Warnings for modules whose op places them but runs as the model's own arithmetic.

    PlacementError where a rule of ktfx's own dialect names the module and has no ``fallback: aten``.
    """
    counts: dict[tuple[str, str], list[str]] = {}
    for placement in resolution.placements.values():
        for phase in PHASES:
            op = placement.at(phase).op
            if placement.rule is None or op is None or _is_run(op):
                continue
            _refuse_if_named(placement, op, resolution)
            modules = counts.setdefault((op, placement.rule.label), [])
            if placement.module not in modules:
                modules.append(placement.module)
    return [
        f"{label}: {op} is not built yet: {len(modules)} modules ({modules[0]}{', …' if len(modules) > 1 else ''}) run "
        "the model's own operations, unquantised, on their device"
        for (op, label), modules in counts.items()
    ]


def _is_run(op: str) -> bool:
    return op in ("aten", "none") or op.endswith(".aten") or family(op) in _REWRITTEN


def _refuse_if_named(placement: ModulePlacement, op: str, resolution: Resolution) -> None:
    rule = placement.rule
    assert rule is not None
    if resolution.ruleset.dialect != "ktfx" or rule.generic or rule.replace.fallback == "aten":
        return
    raise PlacementError(
        f"{op} is not built yet",
        origin=rule.origin,
        rule=rule.label,
        module=placement.module,
        expected="an op that runs: experts.aten, experts.cpu, experts.triton, or aten",
        mend="leave the op out (a device alone places the module), or add `fallback: aten` to the rule",
    )
