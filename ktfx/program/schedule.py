"""The fewest runs on one device that keep the order's meaning.

Nodes of one device that wait for the same set of other devices' results become ready together; they are one group.
A run on a device takes every group that is ready (taking more never hurts), so a state is the set of groups done and a
breadth-first search over the choice of the next device, with dominated states dropped, finds the minimum. Two devices
leave no choice but the first; layered models with many devices keep a handful of states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_STATES = 512


@dataclass(frozen=True)
class Schedule:
    """devices: the device name of each run, in order. run_of: for each node (by index) the run that computes it.

    exact: False if the search had to drop states and the number of runs may not be the minimum.
    """

    devices: tuple[str, ...]
    run_of: tuple[int, ...]
    exact: bool = True


def schedule_runs(devices: Sequence[str], inputs: Sequence[Sequence[int]]) -> Schedule:
    """Assign each node to a run.

    devices[i]: device name of node i; nodes are given in a topological order. inputs[i]: the nodes that node i reads.
    A node with freedom goes to the run of its predecessor in the given order, so that a layer's nodes stay together.
    """
    _, group_device, need = _groups(devices, inputs)
    sequence, exact = _fewest_runs(group_device, need)
    return Schedule(tuple(sequence), tuple(_assign(devices, inputs, sequence)), exact)


def _groups(devices: Sequence[str], inputs: Sequence[Sequence[int]]) -> tuple[list[int], list[str], list[int]]:
    """(group of each node, device of each group, for each group the bit set of groups that must be done before)."""
    group_of: list[int] = []
    keys: dict[tuple[str, int], int] = {}
    group_device: list[str] = []
    need: list[int] = []
    for node, device in enumerate(devices):
        before = 0
        for argument in inputs[node]:
            other = group_of[argument]
            before |= need[other]
            if devices[argument] != device:
                before |= 1 << other
        key = (device, before)
        group = keys.get(key)
        if group is None:
            group = keys[key] = len(group_device)
            group_device.append(device)
            need.append(before)
        group_of.append(group)
    return group_of, group_device, need


def _fewest_runs(group_device: list[str], need: list[int]) -> tuple[list[str], bool]:
    names = list(dict.fromkeys(group_device))
    by_device = {d: [g for g, owner in enumerate(group_device) if owner == d] for d in names}
    everything = (1 << len(group_device)) - 1
    if everything == 0:
        return [], True
    states: dict[int, list[str]] = {0: []}
    exact = True
    while True:
        following: dict[int, list[str]] = {}
        for done, path in states.items():
            for device in names:
                if path and path[-1] == device:
                    continue
                after = done
                for group in by_device[device]:
                    if not (done >> group) & 1 and need[group] & ~after == 0:
                        after |= 1 << group
                if after == everything:
                    return [*path, device], exact
                if after != done:
                    following.setdefault(after, [*path, device])
        states = _undominated(following)
        if len(states) > MAX_STATES:
            best = sorted(states, key=lambda s: -s.bit_count())[:MAX_STATES]
            states = {s: states[s] for s in best}
            exact = False


def _undominated(states: dict[int, list[str]]) -> dict[int, list[str]]:
    kept: dict[int, list[str]] = {}
    for state in sorted(states, key=lambda s: -s.bit_count()):
        if not any(state & ~other == 0 for other in kept):
            kept[state] = states[state]
    return kept


def _assign(devices: Sequence[str], inputs: Sequence[Sequence[int]], sequence: Sequence[str]) -> list[int]:
    """A run for each node: as near as possible to where the given order has it, between its earliest and latest."""
    count = len(devices)
    latest = [len(sequence) - 1] * count
    previous_run = _previous_run(sequence)
    for node in range(count - 1, -1, -1):
        latest[node] = previous_run[devices[node]][latest[node]]
        for argument in inputs[node]:
            bound = latest[node] if devices[argument] == devices[node] else latest[node] - 1
            latest[argument] = min(latest[argument], bound)
    next_run = _next_run(sequence)
    run_of: list[int] = []
    current = 0
    for node in range(count):
        earliest = 0
        for argument in inputs[node]:
            same = devices[argument] == devices[node]
            earliest = max(earliest, run_of[argument] + (0 if same else 1))
        wanted = next_run[devices[node]][min(max(earliest, current), len(sequence) - 1)]
        if wanted is None or wanted > latest[node]:
            wanted = latest[node]
        run_of.append(wanted)
        current = max(current, wanted)
    return run_of


def _previous_run(sequence: Sequence[str]) -> dict[str, list[int]]:
    """For each device, at each position, the last run of that device at or before it (-1: none)."""
    table: dict[str, list[int]] = {}
    for device in dict.fromkeys(sequence):
        last, row = -1, []
        for run, owner in enumerate(sequence):
            last = run if owner == device else last
            row.append(last)
        table[device] = row
    return table


def _next_run(sequence: Sequence[str]) -> dict[str, list[int | None]]:
    """For each device, at each position, the first run of that device at or after it (None: none)."""
    table: dict[str, list[int | None]] = {}
    for device in dict.fromkeys(sequence):
        following: int | None = None
        row: list[int | None] = []
        for run in range(len(sequence) - 1, -1, -1):
            following = run if sequence[run] == device else following
            row.append(following)
        table[device] = row[::-1]
    return table
