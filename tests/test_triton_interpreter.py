"""Runs every test_triton_*.py in Triton's interpreter, in processes of their own; see triton_cases.py for why."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from triton_cases import INTERPRETED

HERE = Path(__file__).parent
FILES = sorted(p.name for p in HERE.glob("test_triton_*.py") if p.name != Path(__file__).name)
# A process takes seconds to start and import: three for all files, of about equal length.
EXPERTS = [f for f in FILES if "experts" in f]
LINEARS = [f for f in FILES if "linear" in f or "integer" in f]
GROUPS = {"experts": EXPERTS, "linears": LINEARS, "others": [f for f in FILES if f not in (*EXPERTS, *LINEARS)]}


@pytest.mark.skipif(INTERPRETED, reason="already in the interpreter")
@pytest.mark.parametrize("group", GROUPS)
def test_in_the_interpreter(group: str) -> None:
    pytest.importorskip("triton")
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-o",
            "addopts=",
            "-p",
            "no:cacheprovider",
            "-m",
            "not gpu and not slow",
            *(str(HERE / name) for name in GROUPS[group]),
        ],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        cwd=HERE.parent,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout, run.stdout[-2000:]
