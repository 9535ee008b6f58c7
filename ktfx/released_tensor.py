"""ReleasedTensor: a parameter whose own memory was given back, because its numbers can be had from elsewhere.

Dynamo and the passes see its shape, dtype and logical device; the compiled program reads the packed weights. Eager code
that touches one gets the right numbers, made anew at every read (slow, never wrong); a write is refused.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ktfx.errors import KtfxError
from ktfx.placed_tensor import PlacedTensor, returns_view, written_arguments

aten = torch.ops.aten


class TensorSource:
    """Where a released tensor's numbers come from. Never copied: Dynamo's guards copy what they compare."""

    @abstractmethod
    def read(self) -> torch.Tensor:
        """The whole tensor in memory of its own."""

    @abstractmethod
    def read_first(self, index: int) -> torch.Tensor:
        """``read()[index]`` without making the rest."""

    def __deepcopy__(self, memo: Any) -> TensorSource:
        return self


class ReleasedTensor(PlacedTensor):
    """shell: a tensor without data (on the meta device) of the parameter's shape, strides and dtype."""

    shell: torch.Tensor
    source: TensorSource

    @staticmethod
    def __new__(  # type: ignore[override]
        cls, shell: torch.Tensor, source: TensorSource, device_name: str, logical: torch.device
    ) -> ReleasedTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            shell.shape,
            strides=shell.stride(),
            storage_offset=0,
            dtype=shell.dtype,
            layout=shell.layout,
            device=logical,
            requires_grad=False,
        )

    def __init__(  # type: ignore[override]
        self, shell: torch.Tensor, source: TensorSource, device_name: str, logical: torch.device
    ) -> None:
        self.shell = shell
        self.source = source
        self.device_name = device_name

    @property
    def physical(self) -> torch.Tensor:  # type: ignore[override]
        """The numbers, made now: nothing holds them."""
        return self.fetch()

    def stand_in(self) -> torch.Tensor:
        return self.shell

    def identity(self) -> int:
        return id(self.source)

    def fetch(self) -> torch.Tensor:
        # Traced: the shell is a fake, or all that is made here would be.
        if type(self.shell) is not torch.Tensor or type(torch.empty(0)) is not torch.Tensor:
            return self.shell.new_empty_strided(self.shape, self.stride(), device=self.device)
        return self.source.read().to(self.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        """A plain parameter: a copy of a compiled model is a plain model."""
        if id(self) not in memo:
            memo[id(self)] = torch.nn.Parameter(self.fetch(), requires_grad=False)
        found: torch.Tensor = memo[id(self)]
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        return torch.nn.Parameter(self.fetch(), requires_grad=False).__reduce_ex__(protocol)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["shell"], (self.source, self.device_name, self.device)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, torch.Tensor], meta: Any, outer_size: Any, outer_stride: Any
    ) -> ReleasedTensor:
        return ReleasedTensor(inner["shell"], *meta)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"ReleasedTensor({tuple(self.shape)}, {self.dtype}, says {self.device})"

    @classmethod
    @torch._disable_dynamo
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(v, ReleasedTensor) for v in written_arguments(func, args, kwargs)):
            raise KtfxError(
                f"{func} writes to a weight whose own memory was released",
                expected="reads only",
                mend="set a new nn.Parameter in its place (load_state_dict(…, assign=True) does), or compile with "
                "release_host=False",
            )
        first = args[0] if args else None
        if isinstance(first, ReleasedTensor):
            if func in (aten.detach.default, aten.alias.default):
                return ReleasedTensor(first.shell, first.source, first.device_name, first.device)
            if returns_view(func):
                return _view_of(first, func, args, kwargs)
        return func(*tree_map(_read, args), **tree_map(_read, kwargs))


def _read(value: Any) -> Any:
    return value.fetch() if isinstance(value, ReleasedTensor) else value


@dataclass(frozen=True, eq=False)
class _ViewSource(TensorSource):
    """A view of a released tensor: read as the view of what is read. index: which of the op's outputs it is."""

    base: TensorSource
    func: Callable[..., Any]
    rest: tuple[Any, ...]
    kwargs: dict[str, Any]
    index: int

    def read(self) -> torch.Tensor:
        if self.func is aten.select.int and self.rest[0] == 0:
            return self.base.read_first(int(self.rest[1]))
        out = self.func(self.base.read(), *self.rest, **self.kwargs)
        return tree_flatten(out)[0][self.index]

    def read_first(self, index: int) -> torch.Tensor:
        return self.read()[index]


def _view_of(first: ReleasedTensor, func: Any, args: Any, kwargs: Any) -> Any:
    rest = tuple(args[1:])
    if func is aten.select.int and rest[0] == 0 and rest[1] < 0:
        rest = (0, rest[1] + first.shape[0])
    out = func(first.shell, *rest, **kwargs)
    leaves, tree = tree_flatten(out)
    placed = [
        ReleasedTensor(shell, _ViewSource(first.source, func, rest, kwargs, i), first.device_name, first.device)
        for i, shell in enumerate(leaves)
    ]
    return tree_unflatten(placed, tree)
