"""Compile time by depth and the host time of a decode step; prints the tables of docs/performance.md.

    python tests/benchmarks/compile_times.py [--layers 4 12 48] [--backend inductor] [--real]

A small-width Qwen3-MoE (hidden 64, 8 experts), two GPUs and experts on the host; simulated on the cpu unless --real.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
warnings.simplefilter("ignore")

import torch  # noqa: E402
from families import tiny_model  # noqa: E402
from parity import static_cache, two_gpus_host  # noqa: E402

import ktfx  # noqa: E402
from ktfx.state import ModelState  # noqa: E402

STEPS = 40


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 12, 48])
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--real", action="store_true", help="use cuda:0 and cuda:1")
    args = parser.parse_args()
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {threads} threads, {args.backend}, {'real GPUs' if args.real else 'simulated'}")
    print("layers  phase     Dynamo  capture  passes  compile  units  distinct  nodes compiled")
    for layers in args.layers:
        measure(layers, args.backend, None if args.real else "cpu")


def measure(layers: int, backend: str, simulate: str | None) -> None:
    torch._dynamo.reset()
    model = tiny_model("qwen3_moe", layers=layers, hidden_size=64)
    ktfx.compile(model, two_gpus_host(layers, "experts.cpu"), simulate=simulate, partition_backend=backend)
    cache = static_cache(model, 5 + 6 * STEPS)
    prompt = torch.randint(0, 90, (1, 5))
    token = prompt[:, :1]
    with torch.no_grad():
        walls = []
        for ids in (prompt, token):
            start = time.perf_counter()
            model(input_ids=ids, past_key_values=cache, use_cache=True)
            walls.append(time.perf_counter() - start)
        state = ktfx.state_of(model)
        for graph, wall in zip(state.graphs, walls, strict=True):
            seconds = graph.seconds
            distinct = graph.built.distinct
            print(
                f"{layers:6}  {graph.phase:8}  {wall - sum(seconds.values()):5.1f}s  {seconds['capture']:6.2f}s "
                f"{seconds['passes']:6.2f}s  {seconds['compile']:6.1f}s  {len(graph.built.units):5}  {len(distinct):8} "
                f"{sum(c.nodes for c in distinct):15}"
            )
        host_times(model, state, token, cache, layers)


def host_times(model: torch.nn.Module, state: ModelState, token: torch.Tensor, cache: object, layers: int) -> None:
    """From the call of the model to the program's first step, and the program against a plain loop over its steps."""
    program = state.graphs[-1].built.program
    marks: list[float] = []
    inner = program.steps[0].run

    def run(slots: list[object]) -> None:
        marks.append(time.perf_counter())
        inner(slots)

    program.steps[0].run = run  # type: ignore[method-assign]
    direct, whole = [], []
    for _ in range(STEPS):
        start = time.perf_counter()
        model(input_ids=token, past_key_values=cache, use_cache=True)
        direct.append(marks[-1] - start)
        whole.append(time.perf_counter() - start)
    del program.steps[0].run
    state.log.calls = []
    model(token, past_key_values=cache, use_cache=True)
    program, arguments = state.log.calls[-1].program, state.log.calls[-1].args
    state.log.calls = None
    call, loop = [], []
    for _ in range(STEPS):
        start = time.perf_counter()
        program(*arguments)
        call.append(time.perf_counter() - start)
        slots = program._current_template(arguments).copy()
        for index, slot in program.arguments:
            slots[slot] = getattr(arguments[index], "physical", arguments[index])
        start = time.perf_counter()
        for step in program.steps:
            step.run(slots)
        loop.append(time.perf_counter() - start)
    rows = {"direct": direct, "whole": whole, "call": call, "loop": loop}
    ms = {name: 1e3 * statistics.median(values) for name, values in rows.items()}
    print(
        f"        {layers} layers, decode step: from the call to the first step {ms['direct']:.3f} ms, "
        f"whole {ms['whole']:.2f} ms; program {ms['call']:.2f} ms, the same steps in a plain loop {ms['loop']:.2f} ms"
    )


if __name__ == "__main__":
    main()
