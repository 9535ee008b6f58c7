"""What a caller does to a compiled model that its program would not see: modules put in the place of others."""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from ktfx.errors import CaptureError


@dataclass
class ModuleWatch:
    """paths: id of each module of a compiled model → its dotted path. replaced: where another module was set since."""

    paths: dict[int, str]
    replaced: list[str] = field(default_factory=list)

    def end(self) -> None:
        _WATCHES.pop(id(self), None)

    def refuse_replaced(self) -> None:
        """CaptureError if the model is not made of the modules that were compiled."""
        if not self.replaced:
            return
        others = f" (and {len(self.replaced) - 1} more)" if len(self.replaced) > 1 else ""
        raise CaptureError(
            f"the module was replaced since the model was compiled{others}",
            module=self.replaced[0],
            expected="the modules that ktfx.compile saw (new numbers in their parameters are noticed and fine)",
            mend="call ktfx.compile(model, …) again after adding adapters or exchanging modules",
        )


# By id; an entry goes with ``end()`` or with its model.
_WATCHES: dict[int, ModuleWatch] = {}


def watch_modules(model: nn.Module) -> ModuleWatch:
    """Note every later ``parent.child = module`` within ``model``.

    Guards on modules would cost each call a third of a millisecond; torch calls a hook at the assignment itself.
    """
    _install_hook()
    watch = ModuleWatch({id(module): path for path, module in model.named_modules()})
    _WATCHES[id(watch)] = watch
    weakref.finalize(model, watch.end)
    return watch


@functools.cache
def _install_hook() -> None:
    """Once and for good: Dynamo guards on the number of these hooks, so that one more would recompile every model."""
    register_module_module_registration_hook(_note)


def _note(module: nn.Module, name: str, value: Any) -> None:
    if torch.compiler.is_compiling() or module._modules.get(name) is value:
        return  # Dynamo traces this where a model's forward sets a module; it must not guard on what follows
    for watch in tuple(_WATCHES.values()):
        path = watch.paths.get(id(module))
        if path is not None:
            watch.replaced.append(f"{path}.{name}" if path else name)
