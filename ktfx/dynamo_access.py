"""What ktfx reads from Dynamo's internals: the live objects behind a graph's inputs. Nothing else touches them.

Dynamo gives a backend fakes and source expressions (``L['self']._modules['model']._parameters['weight']``). Rules are
resolved against the module tree, so the tree itself is needed; it is reached through the frame under translation.
Seen on torch 2.11 and 2.13; ``tests/test_capture.py`` fails if a version moves these names.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ktfx.errors import CaptureError

_MODULE_STEP = re.compile(r"\._modules\['([^']*)'\]|\.(?!_modules|_parameters|_buffers)(\w+)|\[(?:'([^']*)'|(\d+))\]")
_LEAF = re.compile(r"\.(_parameters|_buffers)\['([^']*)'\]$")


@dataclass(frozen=True)
class Frame:
    """The Python frame that Dynamo is translating."""

    local_scope: dict[str, Any]
    global_scope: dict[str, Any]
    code_name: str

    def evaluate(self, source: str) -> Any:
        """The live object that a source expression names; None if it cannot be reached."""
        try:
            return eval(source, {"L": self.local_scope, "G": self.global_scope, "torch": torch})
        except Exception:  # a source form that is no plain expression
            return None


def current_frame() -> Frame | None:
    """The frame under translation, or None outside Dynamo."""
    from torch._dynamo.exc import Unsupported
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        tx = InstructionTranslator.current_tx()
    except (AttributeError, Unsupported, LookupError):
        return None
    root = tx.output.root_tx if tx.output.root_tx is not None else tx
    return Frame(dict(tx.output.local_scope), dict(tx.output.global_scope), root.f_code.co_name)


def with_own_code(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The bound method ``forward`` with a code object of its own; what is no Python method comes back as it is.

    Dynamo keeps its compiled graphs, and counts them against the recompile limit, by code object; transformers wraps
    every model's forward in the same decorators, so all models in a process would share one list and one limit.
    """
    if not isinstance(forward, types.MethodType) or not isinstance(forward.__func__, types.FunctionType):
        return forward
    function = forward.__func__
    own = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    own.__kwdefaults__ = function.__kwdefaults__
    own.__doc__, own.__qualname__, own.__module__ = function.__doc__, function.__qualname__, function.__module__
    own.__dict__.update(function.__dict__)
    return types.MethodType(own, forward.__self__)


def source_name(node: fx.Node) -> str:
    """The source expression of a Dynamo placeholder, ``""`` if it has none."""
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return ""
    name = source.name
    return name() if callable(name) else name


@dataclass(frozen=True)
class WeightSource:
    """A parameter or buffer of the model: the expression of the module Dynamo started from, and the dotted rest."""

    root: str
    name: str
    kind: str


def weight_source(source: str) -> WeightSource | None:
    """Split ``L['self']._modules['a']._parameters['w']`` into (``L['self']``, ``a.w``, ``parameter``)."""
    leaf = _LEAF.search(source)
    if not leaf:
        return None
    body, kind = source[: leaf.start()], "parameter" if leaf[1] == "_parameters" else "buffer"
    start = body.find("._modules[")
    root, rest = (body, "") if start < 0 else (body[:start], body[start:])
    names = [next(g for g in m.groups() if g is not None) for m in _MODULE_STEP.finditer(rest)]
    return WeightSource(root, ".".join([*names, leaf[2]]), kind)


def live_module(frame: Frame | None, root: str) -> nn.Module:
    """The module that a root expression names."""
    module = frame.evaluate(root) if frame is not None else None
    if not isinstance(module, nn.Module):
        raise CaptureError(
            f"the model behind {root} could not be reached from the traced frame",
            expected="a graph traced from an nn.Module's forward",
            mend="compile the module itself: torch.compile(model, backend='ktfx') or ktfx.compile(model, rules=…)",
        )
    return module
