"""Copies of a compiled model (``copy.deepcopy``, ``pickle``, ``torch.save``): plain models that are not compiled."""

from __future__ import annotations

import copy
import functools
import weakref
from typing import Any

from torch import nn

_HOOK = "__getstate__"


def leave_out_of_copies(
    model: nn.Module, names: tuple[str, ...], own: dict[str, Any], generation: dict[str, Any]
) -> None:
    """Let copies of ``model`` be made without what ktfx put on it.

    A compiled forward knows its own model: in a copy it would run the original's weights.
    names: instance attributes that a copy goes without. own: what the model itself had under such names.
    generation: the generation settings that a copy gets back.
    """
    model.__dict__[_HOOK] = functools.partial(_plain_state, weakref.ref(model), (*names, _HOOK), own, generation)


def stop_leaving_out(model: nn.Module) -> None:
    model.__dict__.pop(_HOOK, None)


def _plain_state(
    model_ref: weakref.ref[nn.Module], names: tuple[str, ...], own: dict[str, Any], generation: dict[str, Any]
) -> dict[str, Any]:
    model = model_ref()
    assert model is not None
    state = {key: value for key, value in model.__dict__.items() if key not in names} | own
    if generation:
        state["generation_config"] = copy.copy(state["generation_config"])
        vars(state["generation_config"]).update(generation)
    return state
