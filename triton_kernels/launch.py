"""What every launcher needs: is this the interpreter, what can this GPU do, and small integer helpers."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch
import triton

P = ParamSpec("P")
R = TypeVar("R")


def on_its_device(launcher: Callable[P, R]) -> Callable[P, R]:
    """Run a launcher with the device of its first tensor current.

    Triton launches on the current device and that device's current stream, whatever its arguments are: with tensors of
    another GPU the kernel would still run, through peer access, but unordered with that GPU's own work.
    """

    @wraps(launcher)
    def launch(*args: P.args, **kwargs: P.kwargs) -> R:
        for arg in args:
            if isinstance(arg, torch.Tensor):
                if arg.is_cuda and arg.device.index != torch.cuda.current_device():
                    with torch.cuda.device(arg.device):
                        return launcher(*args, **kwargs)
                break
        return launcher(*args, **kwargs)

    return launch


def interpreted() -> bool:
    """True if kernels run in Triton's interpreter (TRITON_INTERPRET=1 when triton was imported), on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def with_asserts() -> dict[str, bool]:
    """Launch arguments of a kernel whose ``device_assert``s count, and only these. The interpreter needs no asking."""
    return {} if interpreted() else {"debug": True, "sanitize_overflow": False}


@lru_cache
def native_fp8(device: torch.device) -> bool:
    """Whether the GPU converts float8 e4m3 itself (compute capability 8.9 or later)."""
    return device.type == "cuda" and not interpreted() and torch.cuda.get_device_capability(device) >= (8, 9)


@lru_cache
def takes_descriptors(device: torch.device) -> bool:
    """Whether a GPU fetches tiles of a tensor by descriptor (TMA: Hopper and later); the interpreter does."""
    return interpreted() or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0))


@lru_cache
def sm_count(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@lru_cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program of a GPU may take; on the CPU those of Hopper."""
    if device.type != "cuda":
        return 232_448
    return int(triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"])


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def pow2(n: int) -> int:
    """The least power of two ≥ n (1 for n ≤ 1)."""
    return 1 << max(n - 1, 0).bit_length()


def bytes_view(t: torch.Tensor) -> torch.Tensor:
    """float8 storage as uint8, which the interpreter and older GPUs can load."""
    return t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t
