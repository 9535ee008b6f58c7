"""The figures of docs/debugging.md: ``python tests/benchmarks/debug_figures.py [recording|bisect|view] [LAYERS]``.

On Qwen3-30B-A3B's structure in small widths, 48 layers unless told otherwise, every fusion on. CPU seconds of this
process and its compilers, so that other work on the machine hardly counts; shares are of one and the same compile.

recording: what counting costs (always on), what keeping graphs costs, and writing them, with each partition backend.
bisect: a wrong rewrite among all of prefill's and decode's. view: the page's size and load time.
"""

from __future__ import annotations

import functools
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import browser

import ktfx.api
import ktfx.pass_manager
from ktfx.debug.bisect import Probe, bisect, numerics_oracle
from ktfx.debug.replay import Replay
from ktfx.debug.session import Setup, run, run_unrewritten
from ktfx.debug.tracing import write_session
from ktfx.debug.view import write_page
from ktfx.graph import insert_call
from ktfx.pass_manager import PassContext, Rewrite, RunCount

MODEL = "qwen3-30b-a3b"
RULES = {
    "ktfx": 1,
    "devices": {"gpu0": "cuda:0", "gpu1": "cuda:1", "host": "cpu"},
    "default_device": "gpu0",
    "layers": ["gpu0", "gpu1"],
    "passes": ["rewrite_experts", "fuse_norms", "fuse_rope", "fuse_router", "fuse_swiglu", "merge_linears"],
    "rules": [{"match": {"module": "experts"}, "replace": {"op": "experts.reference", "device": "host"}}],
}


def cpu() -> float:
    """CPU seconds of this process and of the compilers it has started and waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


class Meter:
    """Adds up the CPU seconds that functions take, by what they are for."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def measure(self, owner: Any, name: str, purpose: str, clock: Callable[[], float] = time.thread_time) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(original)
        def measured(*args: Any, **kwargs: Any) -> Any:
            start = clock()
            try:
                return original(*args, **kwargs)
            finally:
                self.seconds[purpose] += clock() - start  # type: ignore[assignment]

        setattr(owner, name, measured)


def recording(layers: int) -> None:
    torch._inductor.config.force_disable_caches = True
    meter = Meter()
    for name in ("allows", "record", "miss"):
        meter.measure(PassContext, name, "counting")
    meter.measure(ktfx.pass_manager, "_count_ops", "counting")
    meter.measure(ktfx.pass_manager, "copy_graph", "keeping")
    # From Dynamo's graph to the program; Dynamo's own tracing before it is left out, so the shares are upper bounds.
    meter.measure(ktfx.api, "compile_graph", "compiling", cpu)
    run(Setup(MODEL, RULES, "cpu", 2, True))  # what only a first compile costs
    for backend in ("eager", "inductor"):
        torch._dynamo.reset()
        meter.seconds.clear()
        session = run(Setup(MODEL, RULES, "cpu", layers, True, backend=backend))
        counting, keeping = meter.seconds["counting"], meter.seconds["keeping"]
        compiling = meter.seconds["compiling"] - counting - keeping
        with tempfile.TemporaryDirectory() as folder:
            start = cpu()
            write_session(session, Path(folder))
            writing = cpu() - start
        print(f"{backend}, {layers} layers: compile {compiling:.1f} CPU s")
        for name, value in (("counting (always)", counting), ("keeping graphs", keeping), ("writing", writing)):
            print(f"  {name}: {value:.2f} s, {value / compiling:.1%}", flush=True)


def bisect_real(layers: int) -> None:
    session = run_unrewritten(Setup(MODEL, RULES, "cpu", layers, True, phase="both"))
    replays = [Replay.of(session.state, graph) for graph in session.compiled]
    count = RunCount()
    runs = [replay.run(keep_graphs=False, count=count) for replay in replays]
    module = f"model.layers.{layers * 2 // 3 - 1}.input_layernorm"
    wrong = next(r for r in runs[1].context.rewrites if r.module == module and r.nodes_after)
    record = PassContext.record

    def recorded(self: PassContext, rewrite: Rewrite) -> None:
        """The decode graph's norm of one layer comes out half as large again."""
        record(self, rewrite)
        if self.phase != "generate" or (rewrite.module, rewrite.what) != (wrong.module, wrong.what):
            return
        graph = self.captured.gm.graph
        node = next(n for n in graph.nodes if n.name == rewrite.nodes_after[-1])
        with graph.inserting_after(node):
            larger = insert_call(graph, torch.ops.aten.mul.Tensor, (node, 1.5), like=node)
        node.replace_all_uses_with(larger, delete_user_cb=lambda user: user is not larger)

    PassContext.record = recorded  # type: ignore[method-assign]
    start, wall = cpu(), time.perf_counter()

    def show(probe: Probe) -> None:
        print(f"  rewrites {probe.limit}, passes {probe.passes}: {probe.good} {probe.seconds:.1f} s", flush=True)

    found = bisect(numerics_oracle(replays), show)
    assert found.number == wrong.number, (found.number, wrong.number)
    print(
        f"bisect over {found.total} rewrites, {layers} layers: {len(found.probes)} runs, {cpu() - start:.0f} CPU s, "
        f"{(time.perf_counter() - wall) / 60:.1f} min; found {found.number}: {found.what}"
    )


def view(layers: int) -> None:
    session = run(Setup(MODEL, RULES, "cpu", layers, True, timeline=True))
    with tempfile.TemporaryDirectory() as folder:
        write_session(session, Path(folder))
        page = write_page(Path(folder))
        nodes = sum(1 for _ in session.graphs[0].records[-1].graph_after.graph.nodes)  # type: ignore[union-attr]
        print(f"page, {layers} layers, {nodes} nodes: {page.stat().st_size / 1e6:.2f} MB")
        if (why := browser.missing()) is not None:
            print(why)
            return
        opened = browser.Browser()
        opened.open(page.as_uri())
        opened.wait("document.body.dataset.ready")
        timing = "performance.getEntriesByType('navigation')[0].loadEventEnd"
        print(f"page load in headless Chromium: {opened.wait(timing):.0f} ms")
        opened.close()


if __name__ == "__main__":
    wanted = sys.argv[1:] or ["recording", "bisect", "view"]
    layers = int(wanted.pop()) if wanted and wanted[-1].isdigit() else 48
    for name in wanted or ["recording", "bisect", "view"]:
        {"recording": recording, "bisect": bisect_real, "view": view}[name](layers)
