"""The op names a rule may write (``experts.cpu``, ``linear.aten``, …), by family, and what roles a family fits."""

from __future__ import annotations

from ktfx.errors import Origin, RuleError, WeightError
from ktfx.formats import parse_format
from ktfx.ops import load_ops
from ktfx.ops.experts import experts_kernel_names
from ktfx.text import did_you_mean

# The names of ktfx's own kernels. Experts kernels are also registered by name, from other packages too.
_FAMILIES: dict[str, tuple[str, ...]] = {
    "experts": ("aten", "cpu", "triton"),
    "linear": ("aten", "cpu", "triton"),
    "norm": ("aten", "triton"),
    "rope": ("aten", "triton"),
    "mlp": ("aten", "triton"),
    "attention": ("aten", "triton"),
}
ANY_MODULE = ("aten", "none")
_ROLES: dict[str, tuple[str, ...]] = {
    "experts": ("experts",),
    "linear": ("linear", "head", "router"),
    "norm": ("norm",),
    "rope": ("rope",),
    "mlp": ("mlp", "shared_experts"),
    "attention": ("attention",),
}


def op_names() -> list[str]:
    """Every op name there is now, kernels registered so far included."""
    names = {*builtin_ops(), *(f"experts.{kernel}" for kernel in experts_kernel_names())}
    return [*ANY_MODULE, *sorted(names)]


def builtin_ops() -> list[str]:
    """The ops of ktfx's own families, whatever is registered besides."""
    return sorted(f"{family}.{kernel}" for family, kernels in _FAMILIES.items() for kernel in kernels)


def checked_op(name: str, origin: Origin, rule: str | None = None) -> str:
    """``name`` if it is an op. RuleError, with the near name, otherwise."""
    if name not in op_names():
        load_ops()  # an installed package may bring the kernel
    known = op_names()
    if name not in known:
        raise RuleError(
            f"unknown op {name!r}",
            origin=origin,
            rule=rule,
            expected="one of " + ", ".join(known),
            mend=did_you_mean(name, known) or "name one of these, or register the kernel before the rules are read",
        )
    return name


def checked_format(name: str, group: int | None, origin: Origin, rule: str | None = None) -> str:
    """A weight format in its full spelling. RuleError for one that does not exist or not with that group."""
    text = f"{name}-g{group}" if group is not None else name
    try:
        parse_format(text)
    except WeightError as error:
        raise RuleError(error.what, origin=origin, rule=rule, expected=error.expected, mend=error.mend) from None
    return text


def family(op: str | None) -> str | None:
    """``experts.cpu`` → ``experts``; None for ops that fit any module."""
    return None if op is None or op in ANY_MODULE else op.split(".")[0]


def fits(op: str | None, role: str | None, is_linear: bool) -> bool:
    """Whether an op's family takes modules of this role. ``is_linear``: the module is an nn.Linear."""
    found = family(op)
    return found is None or (role in _ROLES[found] and (found != "linear" or is_linear))


def runs_on_host(op: str | None) -> bool:
    """Whether an op runs on the host only."""
    return op is not None and op.endswith(".cpu")


def roles_for(op: str) -> tuple[str, ...]:
    """The roles that an op's family fits; all of them for ``aten``."""
    found = family(op)
    return () if found is None else _ROLES[found]
