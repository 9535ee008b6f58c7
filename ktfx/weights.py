"""WeightStore: one physical copy of each weight per device and format, shared by every graph of a model.

The prefill graph, the decode graph and every recompile ask the same store. A weight already where it is wanted is not
copied; tied parameters (one storage, two names) are one weight.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from ktfx.devices import DeviceMap
from ktfx.errors import WeightError
from ktfx.pack_cache import PackCache
from ktfx.placed_tensor import PlacedTensor, physical_of
from ktfx.progress import report as report_progress
from ktfx.released_tensor import ReleasedTensor
from ktfx.weight_requests import WeightRequest


@dataclass(frozen=True)
class PackedWeight:
    """One tensor of a request: what a ``packed`` placeholder stands for."""

    request: WeightRequest
    index: int


# A weight's name, which tensor it was and where its data lay, and its write counter: as they were when it was copied.
Stamp = tuple[str, tuple[int, int], int]


@dataclass
class StoredWeight:
    """A physical copy. ``owned`` is False where it is the model's own tensor; ``request`` is None for a parameter as it
    is."""

    names: tuple[str, ...]
    device: str
    format: str
    tensors: list[torch.Tensor]
    owned: bool
    sources: list[Stamp] = field(default_factory=list)
    request: WeightRequest | None = None

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors)


def version_of(tensor: torch.Tensor) -> int:
    """The tensor's write counter; 0 where torch keeps none (inference tensors)."""
    return 0 if tensor.is_inference() else tensor._version


def address_of(tensor: torch.Tensor) -> int:
    """Where the tensor's data lie: ``p.data = …`` and ``model.to(…)`` change it and no counter. 0 for wrappers."""
    return tensor.data_ptr() if type(tensor) in (nn.Parameter, torch.Tensor) else 0


class WeightStore:
    """All physical weights of one model.

    logical_name: the device name where the model's plain parameters lie. pack_cache: packed experts kept on disk.
    """

    def __init__(
        self, model: nn.Module, devices: DeviceMap, logical_name: str, pack_cache: PackCache | None = None
    ) -> None:
        self._model = weakref.ref(model)
        self.devices = devices
        self.logical_name = logical_name
        self.pack_cache = pack_cache
        self._entries: dict[tuple[str, str, str], StoredWeight] = {}
        self._canonical: dict[str, str] = {}
        self._index_names()

    def reindex(self) -> None:
        """Learn the parameters' storages anew, after the model's parameters were replaced on purpose."""
        self._canonical.clear()
        self._index_names()

    def _index_names(self) -> None:
        first: dict[tuple[object, ...], str] = {}
        for name, tensor in _named_tensors(self.model):
            self._canonical[name] = first.setdefault(_storage_key(tensor), name)

    @property
    def model(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise WeightError("the model of these weights is gone", mend="keep a reference to the model")
        return model

    def tensor(self, name: str) -> torch.Tensor:
        """The model's own parameter or buffer of that dotted name."""
        path, _, leaf = name.rpartition(".")
        value = getattr(self.model.get_submodule(path), leaf, None)
        if not isinstance(value, torch.Tensor):
            raise WeightError("the model has no such parameter any more", module=name, mend="compile the model again")
        return value

    def copy_of(self, tensor: torch.Tensor, name: str, device: str) -> torch.Tensor:
        """A tensor that is not the model's own under ``name``, on a device name; not kept."""
        physical = physical_of(tensor).detach()
        if _own_place(tensor, self.logical_name) == device:
            return physical
        return _copy_to(physical, self.devices[device], name, device)

    def pack_of(self, request: WeightRequest, given: Mapping[str, torch.Tensor], device: str) -> list[torch.Tensor]:
        """Tensors that are not the model's own, in a kernel's layout; not kept."""
        tensors = {
            part: physical_of(given[name] if name in given else self.tensor(name)).detach()
            for part, name in request.parts
        }
        target = self.devices[device]
        if self.pack_cache is None:
            return request.pack(tensors, target)
        return self.pack_cache.packed(request, tensors, target)

    def canonical(self, name: str) -> str:
        return self._canonical.get(name, name)

    def plain(self, name: str, device: str) -> torch.Tensor:
        """The weight in the model's own dtype on a device name."""
        key = (self.canonical(name), device, "model")
        entry = self._current(key)
        if entry is None:
            source = self.tensor(name)
            own = _own_place(source, self.logical_name) == device and not isinstance(source, ReleasedTensor)
            tensor = self.copy_of(source, name, device)
            entry = StoredWeight((key[0],), device, "model", [tensor], owned=not own)
            entry.sources = [self._stamp(name)]
            self._entries[key] = entry
        return entry.tensors[0]

    def packed(self, request: WeightRequest, device: str) -> list[torch.Tensor]:
        """The tensors of a request on a device name; made at the first request."""
        key = self._key(request, device)
        names = tuple(self.canonical(n) for _, n in request.parts)
        entry = self._current(key)
        if entry is None:
            entry = StoredWeight(names, device, request.format, self._pack(request, device), owned=True)
            entry.sources = [self._stamp(n) for _, n in request.parts]
            entry.request = request
            self._entries[key] = entry
        return entry.tensors

    def pack_all(self, wanted: Iterable[tuple[WeightRequest, str]]) -> None:
        """Make the tensors of (request, device name) pairs, one after another, and report how far it has come."""
        missing = [pair for pair in dict.fromkeys(wanted) if self._key(*pair) not in self._entries]
        for done, (request, device) in enumerate(missing):
            report_progress("pack", done, len(missing))
            self.packed(request, device)

    def source_replaced(self, names: list[str]) -> None:
        """The parameters of these names were replaced on purpose by others that hold the same numbers."""
        for entry in self._entries.values():
            entry.sources = [self._stamp(n) if n in names else (n, i, v) for n, i, v in entry.sources]

    def kept_originals(self) -> dict[str, int]:
        """Bytes of the model's own parameters that lie beside a packed copy of them, by name."""
        kept = {}
        for entry in self._entries.values():
            for name in entry.names if entry.request is not None else ():
                tensor = self.tensor(name)
                if not isinstance(tensor, ReleasedTensor):
                    kept[name] = tensor.numel() * tensor.element_size()
        return kept

    def _key(self, request: WeightRequest, device: str) -> tuple[str, str, str]:
        names = "|".join(self.canonical(n) for _, n in request.parts)
        return (names, device, f"{request.kernel}:{request.spec_text}")

    def _current(self, key: tuple[str, str, str]) -> StoredWeight | None:
        """The entry, renewed if its parameter changed since: a graph compiled later must not find the old numbers."""
        entry = self._entries.get(key)
        if entry is not None and any(self._stamp(n) != (n, i, v) for n, i, v in entry.sources):
            self.refresh([n for n, _, _ in entry.sources])
        return entry

    def _pack(self, request: WeightRequest, device: str) -> list[torch.Tensor]:
        return self.pack_of(request, {}, device)

    def _stamp(self, name: str) -> Stamp:
        tensor = self.tensor(name)
        return (name, (id(tensor), address_of(tensor)), version_of(tensor))

    def changed(self) -> list[str]:
        """Names whose parameter was replaced or written to since it was placed."""
        seen: dict[str, bool] = {}
        for entry in self._entries.values():
            for stamp in entry.sources:
                seen[stamp[0]] = seen.get(stamp[0], False) or self._stamp(stamp[0]) != stamp
        return [name for name, is_changed in seen.items() if is_changed]

    def refresh(self, names: list[str] | None = None) -> int:
        """Bring the copies of changed weights up to date, in place, so that bound programs see them.

        names: dotted names to renew; None renews all (``ktfx.refresh``: writes through ``.data`` leave no trace).
        Returns the number of copies renewed.
        """
        wanted = None if names is None else {self.canonical(n) for n in names} | set(names)
        count = 0
        for entry in self._entries.values():
            sources = [n for n, _, _ in entry.sources]
            if wanted is not None and not wanted.intersection(sources) and not wanted.intersection(entry.names):
                continue
            if self._needs_no_renewal(entry):
                continue
            if entry.request is None:
                source = physical_of(self.tensor(sources[0])).detach()
                if source is not entry.tensors[0] and source.data_ptr() != entry.tensors[0].data_ptr():
                    _check_shape(sources[0], source, entry.tensors[0])
                    entry.tensors[0].copy_(source)
            else:
                for old, new in zip(entry.tensors, self._pack(entry.request, entry.device), strict=True):
                    old.copy_(new)
            entry.sources = [self._stamp(n) for n in sources]
            count += 1
        return count

    def _needs_no_renewal(self, entry: StoredWeight) -> bool:
        """Released parameters refuse writes: while none was replaced, the pack is what they are."""
        return entry.request is not None and all(
            isinstance(self.tensor(n), ReleasedTensor) and self._stamp(n) == (n, i, v) for n, i, v in entry.sources
        )

    def entries(self) -> Iterator[StoredWeight]:
        yield from self._entries.values()

    def bytes_by_device(self) -> dict[str, int]:
        """Bytes of physical weights per device name (the model's own tensors count where they lie)."""
        total: dict[str, int] = {}
        for entry in self._entries.values():
            total[entry.device] = total.get(entry.device, 0) + entry.nbytes
        return total

    def duplicates(self) -> list[tuple[str, list[StoredWeight]]]:
        """Weights with more than one physical copy: (name, its copies)."""
        by_name: dict[str, list[StoredWeight]] = {}
        for entry in self._entries.values():
            for name in entry.names:
                by_name.setdefault(name, []).append(entry)
        return [(name, entries) for name, entries in by_name.items() if len(entries) > 1]


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _storage_key(tensor: torch.Tensor) -> tuple[object, ...]:
    if isinstance(tensor, ReleasedTensor):
        return (tensor.identity(),)
    physical = physical_of(tensor)
    if physical.device.type == "meta":
        return (id(tensor),)
    return (
        str(physical.device),
        physical.untyped_storage().data_ptr() or id(tensor),
        physical.storage_offset(),
        tuple(physical.shape),
        physical.stride(),
        physical.dtype,
    )


def _own_place(tensor: torch.Tensor, logical_name: str) -> str:
    return tensor.device_name if isinstance(tensor, PlacedTensor) else logical_name


def _copy_to(source: torch.Tensor, device: torch.device, name: str, device_name: str) -> torch.Tensor:
    if source.device.type == "meta":
        raise WeightError(
            "the parameter has no data (it is on the meta device)",
            module=name,
            mend="load the weights first: ktfx.from_pretrained(path, rules=…), or model.to_empty and load_state_dict",
        )
    try:
        return source.to(device, copy=True)
    except torch.OutOfMemoryError as error:
        raise WeightError(
            f"{device_name} ({device}) has no room for {source.numel() * source.element_size()} bytes more",
            module=name,
            mend="place fewer layers there, or the experts of some on the host",
        ) from error


def _check_shape(name: str, new: torch.Tensor, old: torch.Tensor) -> None:
    if new.shape != old.shape or new.dtype != old.dtype:
        raise WeightError(
            f"the parameter became {tuple(new.shape)} {new.dtype}; it was compiled as {tuple(old.shape)} {old.dtype}",
            module=name,
            mend="compile the model again",
        )
