"""Let modules over quantised weights run ops that can be traced, where their own forward cannot be.

transformers' ``FP8Linear`` and ``FP8Experts`` pick a GPU kernel at run time, or loop over the experts that were hit.
``ktfx.compile`` gives these instances a forward that calls one op over the stored tensors; ``give_up`` takes it away.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from ktfx.stored_experts import StoredExperts, StoredExpertsCall, run_stored_experts
from ktfx.stored_linears import StoredLinear, run_stored_linear, stored_weight_of

_FORWARD = "_ktfx_stored_forward"


def adopt(model: nn.Module) -> int:
    """Let every such module run ktfx's op; returns how many. ``give_up`` undoes it."""
    count = 0
    for module in model.modules():
        if _FORWARD in module.__dict__ or isinstance(module, StoredLinear | StoredExperts):
            continue
        run, call = _stored_call(module)
        if call is None:
            continue
        object.__setattr__(module, _FORWARD, module.__dict__.get("forward"))
        module.__dict__["stored_call"] = call
        module.__dict__["forward"] = MethodType(run, module)
        count += 1
    return count


def _stored_call(module: nn.Module) -> tuple[Callable[..., Any], Any]:
    if type(module).__name__ == "FP8Linear":  # not its subclasses, whose layers are other products
        return run_stored_linear, stored_weight_of(module)
    return run_stored_experts, StoredExpertsCall.of(module)


def give_up(model: nn.Module) -> None:
    """The modules' own forwards come back."""
    for module in model.modules():
        if _FORWARD not in module.__dict__:
            continue
        before = module.__dict__.pop(_FORWARD)
        del module.__dict__["forward"], module.__dict__["stored_call"]
        if before is not None:
            module.__dict__["forward"] = before
