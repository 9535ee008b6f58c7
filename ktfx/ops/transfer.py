"""``ktfx::transfer``: a value crosses from one device name to another. The program runs it as a step of its own."""

from __future__ import annotations

import torch
from torch import fx


@torch.library.custom_op("ktfx::transfer", mutates_args=())
def transfer(x: torch.Tensor, source: str, target: str) -> torch.Tensor:
    """A copy of ``x``, always fresh: two names may be one real device when simulated, and must not alias.

    Run eagerly (checks of a graph before it is cut) it stays on the logical device; the program moves it for real.
    """
    return x.to(x.device, copy=True)


@transfer.register_fake
def _(x: torch.Tensor, source: str, target: str) -> torch.Tensor:
    # As the program's step lays it out: a slice arrives dense, with strides of its own.
    return x.to(x.device, copy=True)


def is_transfer(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is torch.ops.ktfx.transfer.default


def transfer_ends(node: fx.Node) -> tuple[str, str]:
    """(source name, target name) of a transfer node."""
    return str(node.args[1]), str(node.args[2])
