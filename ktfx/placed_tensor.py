"""PlacedTensor: a tensor that says it lies on the logical device while its data lie elsewhere.

Dynamo sees the logical device only; the program unwraps ``physical``. Eager code that touches one still computes with
the right numbers: reads fetch a copy, writes run on the physical tensor, and what can do neither raises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map

from ktfx.errors import KtfxError

aten = torch.ops.aten

# Results of these stay placed: parameters and caches survive .detach(), beam search's reordering and reset().
_KEEP_PLACED = frozenset(
    {
        aten.detach.default,
        aten.alias.default,
        aten.clone.default,
        aten.index_select.default,
    }
)


class PlacedTensor(torch.Tensor):
    """A traceable wrapper subclass.

    physical: the tensor that holds the data, on its real device.
    device_name: the device's name in the rules (two names may be one real device when simulated).
    logical: the device it reports.
    """

    physical: torch.Tensor
    device_name: str

    @staticmethod
    def __new__(cls, physical: torch.Tensor, device_name: str, logical: torch.device) -> PlacedTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            physical.shape,
            strides=physical.stride(),
            storage_offset=physical.storage_offset(),
            dtype=physical.dtype,
            layout=physical.layout,
            device=logical,
            requires_grad=False,
        )

    def __init__(self, physical: torch.Tensor, device_name: str, logical: torch.device) -> None:
        self.physical = physical
        self.device_name = device_name

    def __tensor_flatten__(self) -> tuple[list[str], tuple[str, torch.device]]:
        return ["physical"], (self.device_name, self.device)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, torch.Tensor], meta: tuple[str, torch.device], outer_size: Any, outer_stride: Any
    ) -> PlacedTensor:
        return PlacedTensor(inner["physical"], *meta)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PlacedTensor({self.device_name}, {tuple(self.shape)}, {self.dtype}, says {self.device})"

    def stand_in(self) -> torch.Tensor:
        """A tensor of the same shape, strides and dtype, for tracing; its data are never read."""
        return self.physical

    def identity(self) -> int:
        """Equal for two tensors over the same data."""
        return id(self.physical)

    def fetch(self) -> torch.Tensor:
        """A copy of the data on the logical device (a copy also when both are one real device)."""
        return self.physical.to(self.device, copy=True)

    @classmethod
    @torch._disable_dynamo  # after a graph break Dynamo would trace this very function
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _KEEP_PLACED:
            return _stay_placed(func, args, kwargs)
        written = written_arguments(func, args, kwargs)
        if written:
            return _write(func, args, kwargs, written)
        if returns_view(func):
            return _view(func, args, kwargs)
        return func(*tree_map(_fetched, args), **tree_map(_fetched, kwargs))


def _fetched(value: Any) -> Any:
    return value.fetch() if isinstance(value, PlacedTensor) else value


def _stay_placed(func: Any, args: Any, kwargs: Any) -> Any:
    first = args[0]
    if not isinstance(first, PlacedTensor):
        return func(*tree_map(_fetched, args), **kwargs)
    device = first.physical.device
    inner_args = tree_map(lambda v: _on(v, device), args)
    return PlacedTensor(func(*inner_args, **kwargs), first.device_name, first.device)


def _on(value: Any, device: torch.device) -> Any:
    """The value as a plain tensor on a real device; 0-d tensors stay, since they mix with any device."""
    if isinstance(value, PlacedTensor):
        return value.physical if value.physical.device == device else value.physical.to(device)
    if isinstance(value, torch.Tensor) and value.dim() > 0:
        return value.to(device)
    return value


def written_arguments(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments that the op's schema says it writes to."""
    written: list[Any] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        written.extend(value if isinstance(value, (list, tuple)) else [value])
    return [v for v in written if v is not None]


def returns_view(func: Any) -> bool:
    schema = func._schema
    return any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)


def _view(func: Any, args: Any, kwargs: Any) -> Any:
    """A view of a placed tensor is placed, over a view of the same data: a write through it is not lost."""

    def unwrap(value: Any) -> Any:
        return value.physical if isinstance(value, PlacedTensor) else value

    first = args[0]
    if not isinstance(first, PlacedTensor):
        return func(*tree_map(_fetched, args), **tree_map(_fetched, kwargs))
    out = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
    return tree_map(
        lambda v: PlacedTensor(v, first.device_name, first.device) if isinstance(v, torch.Tensor) else v, out
    )


def _write(func: Any, args: Any, kwargs: Any, written: list[Any]) -> Any:
    """Run a mutating op where the written tensors are: on the physical ones, everything else brought to them."""
    placed = [v for v in written if isinstance(v, PlacedTensor)]
    if not placed:
        return func(*tree_map(_fetched, args), **tree_map(_fetched, kwargs))
    devices = {v.physical.device for v in placed}
    if len(placed) != len(written) or len(devices) > 1:
        raise KtfxError(
            f"{func} writes to tensors in different places at once",
            expected="all written tensors on one device",
            mend="write to each tensor on its own",
        )
    device = devices.pop()
    func(*tree_map(lambda v: _on(v, device), args), **tree_map(lambda v: _on(v, device), kwargs))
    return written[0] if len(written) == 1 else tuple(written)


def physical_of(value: torch.Tensor) -> torch.Tensor:
    """The tensor that holds the data: ``value`` itself, or what a placed tensor (or parameter) wraps."""
    return value.physical if isinstance(value, PlacedTensor) else value
