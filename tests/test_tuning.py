"""Remembered configurations: written whole, read back, and never needed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ktfx import tuning


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KTFX_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_gpu", lambda device: ("A GPU", (8, 0)))
    tuning._read.cache_clear()
    return tmp_path / "tuned.json"


def test_what_a_sweep_found_is_read_back_for_its_gpu_only(table: Path) -> None:
    assert tuning.remembered("k", torch.device("cuda:0")) is None
    assert tuning.remember("A GPU", {"k": [{"R": 4}]}) == table
    tuning.remember("A GPU", {"other": [{"R": 1}]})
    tuning.remember("Another", {"k": [{"R": 9}]})
    assert tuning.remembered("k", torch.device("cuda:0")) == [{"R": 4}]
    assert tuning.remembered("other", torch.device("cuda:0")) == [{"R": 1}]
    assert tuning.remembered("k", torch.device("cpu")) is None
    assert [p.name for p in table.parent.iterdir()] == ["tuned.json"]


def test_a_broken_table_is_no_table(table: Path) -> None:
    table.write_text("{")
    assert tuning.remembered("k", torch.device("cuda:0")) is None


@pytest.mark.parametrize(("tokens", "expected"), [(1, 1), (2, 2), (3, 4), (4096, 4096), (4097, 8192)])
def test_buckets(tokens: int, expected: int) -> None:
    assert tuning.bucket(tokens) == expected
