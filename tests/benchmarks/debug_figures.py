"""The figures of docs/debugging.md: ``python tests/benchmarks/debug_figures.py [LAYERS]``.

A planted model of so many layers (48): what recording costs, how long a bisect takes, how large the page is.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import browser
from planted import inputs, planted_model, planted_rules

import ktfx
import ktfx.ruleset
from ktfx.debug.bisect import bisect, numerics_oracle
from ktfx.debug.replay import Replay
from ktfx.debug.session import run_module
from ktfx.debug.tracing import write_session
from ktfx.debug.view import write_page


def compile_seconds(layers: int, keep: bool) -> float:
    torch._dynamo.reset()
    model = planted_model(layers)
    start = time.process_time()
    with torch.no_grad():
        ktfx.compile(model, planted_rules("none"), simulate="cpu", partition_backend="eager", keep_graphs=keep)(
            *inputs()
        )
    return time.process_time() - start


def main(layers: int) -> None:
    compile_seconds(2, True)
    # In turn, and in CPU seconds: a busy machine slows both alike.
    pairs = [(compile_seconds(layers, False), compile_seconds(layers, True)) for _ in range(3)]
    without, recorded = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"compile and first call, {layers} layers: {without:.2f} CPU s, recorded {recorded:.2f} CPU s")

    session = run_module(planted_model(layers), inputs(), planted_rules("none", per_layer=4), simulate="cpu")
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        write_session(session, Path(folder))
        print(f"writing the trace: {time.perf_counter() - start:.1f} s")
        page = write_page(Path(folder))
        print(f"page: {page.stat().st_size / 1e6:.2f} MB")
        if browser.missing() is None:
            opened = browser.Browser()
            opened.open(page.as_uri())
            opened.wait("document.body.dataset.ready")
            timing = "performance.getEntriesByType('navigation')[0].loadEventEnd"
            print(f"page load in headless Chromium: {opened.wait(timing):.0f} ms")
            opened.close()

    replay = Replay.of(session.state, session.state.graphs[0])
    rules = ktfx.ruleset.load_ruleset(planted_rules("wrong_literal", layers * 2 // 3, per_layer=4))
    object.__setattr__(replay.state.ruleset, "passes", rules.passes)
    start = time.perf_counter()
    found = bisect(numerics_oracle(replay)[0])
    print(
        f"bisect over {found.total} rewrites: {len(found.probes)} runs, {time.perf_counter() - start:.1f} s; "
        f"found {found.number}"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 48)
