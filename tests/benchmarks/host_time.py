"""Host time of a decode step: from the call of the model to the program's first step, which stands in for all of them.

    python tests/benchmarks/host_time.py [LAYERS]

A small-width Qwen3-MoE, two GPUs and experts on the host, simulated; the median of 300 direct calls, wall and CPU time.
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
warnings.simplefilter("ignore")

import torch  # noqa: E402
from families import tiny_model  # noqa: E402
from parity import static_cache, two_gpus_host  # noqa: E402

import ktfx  # noqa: E402

CALLS = 300


class Reached(Exception):
    """Ends a call at the first step."""


class FirstStep:
    """In the place of the program's steps: notes when it was reached."""

    frees = ()

    def __init__(self) -> None:
        self.at = (0.0, 0.0)

    def run(self, slots: list[Any]) -> None:
        self.at = time.perf_counter(), time.thread_time()
        raise Reached


def main() -> None:
    layers = int(sys.argv[1]) if len(sys.argv) > 1 else 48
    torch.set_grad_enabled(False)
    model = tiny_model("qwen3_moe", layers=layers, hidden_size=64)
    ktfx.compile(model, two_gpus_host(layers, "experts.cpu"), simulate="cpu", partition_backend="eager")
    call = {"input_ids": torch.tensor([[3]]), "past_key_values": static_cache(model, 16), "use_cache": True}
    for _ in range(3):  # fills the cache's tensors, compiles, and is noted for direct calls
        model(**call)
    first = FirstStep()
    ktfx.state_of(model).graphs[-1].built.program.steps = [first]  # type: ignore[list-item]
    wall, cpu = [], []
    for _ in range(CALLS):
        start = time.perf_counter(), time.thread_time()
        try:
            model(**call)
        except Reached:
            wall.append(1e3 * (first.at[0] - start[0]))
            cpu.append(1e3 * (first.at[1] - start[1]))
    print(
        f"torch {torch.__version__}, {layers} layers: {statistics.median(wall):.3f} ms to the first step "
        f"({statistics.median(cpu):.3f} ms of CPU), fastest {min(wall):.3f}"
    )


if __name__ == "__main__":
    main()
