"""Ops that a rule may name and that no pass runs yet: refused where a module is named, said where files are generic."""

from __future__ import annotations

from ktfx.errors import PlacementError
from ktfx.op_names import family
from ktfx.resolve import PHASES, ModulePlacement, Resolution

# Family → the pass that puts its kernels in by a module's rule (fused norms and the like come by `passes:`).
_REWRITTEN = {"experts": "rewrite_experts", "linear": "rewrite_linears"}


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
    ] + _left_out(resolution)


def _left_out(resolution: Resolution) -> list[str]:
    """Warnings for ops whose pass is not among the file's own `passes:`."""
    if resolution.ruleset.passes is None:
        return []
    chosen = {request.name for request in resolution.ruleset.passes}
    rules: dict[tuple[str, str], None] = {}
    for placement in resolution.placements.values():
        for phase in PHASES:
            op = placement.at(phase).op
            if placement.rule is not None and op is not None and not op.endswith(".aten"):
                needed = _REWRITTEN.get(family(op) or "")
                if needed is not None and needed not in chosen:
                    rules[f"{placement.rule.label}: {op}", needed] = None
    return [
        f"{what} has no effect but its device: `passes:` leaves out {needed}, which puts it in"
        for what, needed in rules
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
        expected="an op that runs: one of experts or linear, or aten",
        mend="leave the op out (a device alone places the module), or add `fallback: aten` to the rule",
    )
