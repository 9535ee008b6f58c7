"""A decode step recorded as CUDA graphs: each run of steps on one GPU is launched at once, the rest as before.

Recording happens during a real call, group by group: a group is captured (which runs nothing) and then replayed, so
that what comes after it reads true values; a group that cannot be captured runs step by step, and says why. Every value
that crosses between groups keeps its address from then on: transfers copy into the buffer that the first call made.
"""

from __future__ import annotations

import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ktfx.errors import KtfxWarning
from ktfx.program.program import Compute, Program, Step, Transfer, describe

Replay = Callable[[], None]


class Recorder(Protocol):
    """Captures what ``run`` launches on ``device``, without running it, and returns what launches it again."""

    def __call__(self, run: Callable[[], None], device: torch.device) -> Replay: ...


@dataclass
class Group:
    """Consecutive steps; ``device``: the GPU they all run on, None for steps that stay as they are."""

    device: torch.device | None
    steps: list[Step]


def groups_of(steps: Sequence[Step], device_of: Callable[[Step], torch.device | None]) -> list[Group]:
    """Cut the steps into the longest runs on one GPU; other steps stand alone, in their order."""
    groups: list[Group] = []
    for step in steps:
        device = device_of(step)
        if device is not None and groups and groups[-1].device == device:
            groups[-1].steps.append(step)
        else:
            groups.append(Group(device, [step]))
    return groups


def cuda_device_of(program: Program) -> Callable[[Step], torch.device | None]:
    """The GPU whose graph a step can be part of."""

    def device_of(step: Step) -> torch.device | None:
        real = program.devices[step.device] if isinstance(step, Compute) else None
        return real if real is not None and real.type == "cuda" else None

    return device_of


class CudaRecorder:
    """Captures into CUDA graphs that share one pool of memory per GPU: they run in the order they were captured in."""

    def __init__(self) -> None:
        self._pools: dict[torch.device, Any] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def __call__(self, run: Callable[[], None], device: torch.device) -> Replay:
        with torch.cuda.device(device):
            pool = self._pools.setdefault(device, torch.cuda.graph_pool_handle())
            stream = self._streams.setdefault(device, torch.cuda.Stream(device))
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize(device)
            with torch.cuda.stream(stream):
                # Other threads (the CPU experts' pool, a loader) may go on using CUDA meanwhile.
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    run()
                except BaseException:
                    _abandon(graph)
                    raise
                graph.capture_end()
        return graph.replay


def _abandon(graph: torch.cuda.CUDAGraph) -> None:
    """End a capture that went wrong; what torch says about it matters less than the error that broke it."""
    try:
        graph.capture_end()
    except RuntimeError:
        return


class Recording:
    """One form of call, recorded. ``run`` gives the program's outputs, or None where it must not be used now.

    fixed: slots whose tensors keep their address between calls (the cache). inputs: slots that change, in the order in
    which ``run`` takes them.
    """

    def __init__(
        self,
        program: Program,
        fixed: Sequence[tuple[int, Any]],
        inputs: Sequence[tuple[int, torch.Tensor]],
        groups: Sequence[Group],
        recorder: Recorder,
    ) -> None:
        self.program = program
        self.generation = program.generation
        self.captured = 0
        self.left_out: list[str] = []
        self._lock = threading.Lock()
        self._stream = _streams(groups)
        self._read_by_graphs = {
            slot
            for group in groups
            if group.device is not None
            for step in group.steps
            if isinstance(step, Compute)
            for slot in step.inputs
        }
        self._slots = program.template.copy()
        for slot, value in fixed:
            self._slots[slot] = value
        self._inputs: list[torch.Tensor] = []
        for slot, tensor in inputs:
            self._inputs.append(tensor.clone())
            self._slots[slot] = self._inputs[-1]
        self._actions: list[Replay] = []
        for group in groups:
            self._record(group, recorder)
        if self.left_out:
            warnings.warn(
                f"{len(self.left_out)} of {len(groups)} parts of a decode step run without a CUDA graph; "
                f"the first: {self.left_out[0]}",
                KtfxWarning,
                stacklevel=2,
            )
        self._first_outputs: list[Any] | None = self._outputs()

    def first_outputs(self) -> list[Any]:
        """What the call that recorded gives."""
        outputs, self._first_outputs = self._first_outputs, None
        assert outputs is not None
        return outputs

    def run(self, inputs: Sequence[torch.Tensor]) -> list[Any] | None:
        """Replay on new inputs of the recorded form."""
        if self.generation != self.program.generation or not self._lock.acquire(blocking=False):
            return None
        try:
            if _current_streams(self._stream) != self._stream:
                return None
            for buffer, value in zip(self._inputs, inputs, strict=True):
                buffer.copy_(value, non_blocking=buffer.is_cuda)
            for action in self._actions:
                action()
            return self._outputs()
        finally:
            self._lock.release()

    def _outputs(self) -> list[Any]:
        """The outputs as tensors of their own: the next replay writes over the recorded ones."""
        slots = self._slots
        return [v.clone() if isinstance(v := slots[o], torch.Tensor) else v for o in self.program.outputs]

    def _record(self, group: Group, recorder: Recorder) -> None:
        slots = self._slots
        if group.device is None:
            for step in group.steps:
                step.run(slots)
                self._actions.append(self._again(step))
            return
        made = {slot for step in group.steps if isinstance(step, Compute) for slot in step.outputs}

        def run() -> None:
            for step in group.steps:
                step.run(slots)
                for slot in step.frees:
                    if slot in made:
                        slots[slot] = None

        try:
            replay = recorder(run, group.device)
        except Exception as error:  # whatever a kernel that cannot be captured raises
            self.left_out.append(f"{describe(group.steps[0])}: {_told(error)}")
            for step in group.steps:
                step.run(slots)
                self._actions.append(self._again(step))
            return
        self.captured += 1
        replay()
        self._actions.append(replay)

    def _again(self, step: Step) -> Replay:
        """The step on later calls. What a graph reads must stay where it was: it is copied into the first result."""
        slots = self._slots
        if isinstance(step, Transfer):
            return _transfer_again(step, slots)
        if not isinstance(step, Compute):
            return lambda: step.run(slots)
        kept = [(slot, slots[slot]) for slot in step.outputs if slot in self._read_by_graphs]

        def compute() -> None:
            step.run(slots)
            for slot, first in kept:
                apart(first).copy_(apart(slots[slot]))
                slots[slot] = first

        return compute


def apart(tensor: torch.Tensor) -> torch.Tensor:
    """The entries that lie apart in memory: an expanded dimension is one entry, which can be written to."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _told(error: Exception) -> str:
    """The error in a line, and the line of code that was running."""
    frames = traceback.extract_tb(error.__traceback__)
    said = str(error).strip().splitlines()
    at = f" (at {Path(frames[-1].filename).name}:{frames[-1].lineno}: {frames[-1].line})" if frames else ""
    return f"{type(error).__name__}: {said[0] if said else ''}{at}"


def _transfer_again(step: Transfer, slots: list[Any]) -> Replay:
    target = slots[step.target]
    source = slots[step.source]
    if step.wait and source.is_cuda:
        # A pinned buffer is written by the copy engine at once; an ordinary one through a staging buffer.
        slots[step.target] = target = torch.empty_like(target, pin_memory=True).copy_(target)

        def to_host() -> None:
            target.copy_(slots[step.source], non_blocking=True)
            torch.cuda.current_stream(source.device).synchronize()

        return to_host
    return lambda: target.copy_(slots[step.source], non_blocking=True)


def _streams(groups: Sequence[Group]) -> dict[int, int]:
    """The current stream of each GPU that has a group."""
    devices = {g.device for g in groups if g.device is not None and g.device.type == "cuda"}
    return _current_streams(dict.fromkeys((d.index or 0 for d in devices), 0))


def _current_streams(of: dict[int, int]) -> dict[int, int]:
    return {index: torch._C._cuda_getCurrentRawStream(index) for index in of}
