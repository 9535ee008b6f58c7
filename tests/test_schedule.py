"""The number of device runs is the minimum, on every small graph hypothesis thinks of."""

from __future__ import annotations

from collections import deque

from hypothesis import given, settings
from hypothesis import strategies as st

from ktfx.program.schedule import schedule_runs


def fewest_by_trying_everything(devices: list[str], inputs: list[list[int]]) -> int:
    """Shortest path over (nodes done, last device) by 0-1 breadth-first search."""
    start: tuple[frozenset[int], str | None] = (frozenset(), None)
    best = {start: 0}
    queue = deque([start])
    while queue:
        done, last = queue.popleft()
        if len(done) == len(devices):
            return best[(done, last)]
        for node, device in enumerate(devices):
            if node in done or not all(i in done for i in inputs[node]):
                continue
            cost = best[(done, last)] + (device != last)
            state = (done | {node}, device)
            if cost < best.get(state, 1 << 30):
                best[state] = cost
                (queue.appendleft if device == last else queue.append)(state)
    raise AssertionError("a cycle")


@st.composite
def graphs(draw):
    count = draw(st.integers(1, 9))
    devices = [draw(st.sampled_from("abc")) for _ in range(count)]
    inputs = [[i for i in range(n) if draw(st.integers(0, 2)) == 0] for n in range(count)]
    return devices, inputs


@settings(max_examples=150, deadline=None)
@given(graphs())
def test_fewest_runs_and_every_read_after_its_write(graph):
    devices, inputs = graph
    schedule = schedule_runs(devices, inputs)
    assert schedule.exact
    assert len(schedule.devices) == fewest_by_trying_everything(devices, inputs)
    for node, run in enumerate(schedule.run_of):
        assert schedule.devices[run] == devices[node]
        for argument in inputs[node]:
            same = devices[argument] == devices[node]
            assert schedule.run_of[argument] < run or (same and schedule.run_of[argument] == run)


def test_a_node_with_freedom_stays_with_its_neighbours():
    """Node 3 reads nothing; it could run first, but its layer (nodes 2 to 4) runs last."""
    devices = ["gpu", "cpu", "gpu", "gpu", "gpu"]
    inputs = [[], [0], [1], [], [2, 3]]
    assert schedule_runs(devices, inputs).run_of == (0, 1, 2, 2, 2)


def test_an_empty_graph_has_no_runs():
    assert schedule_runs([], []).devices == ()
