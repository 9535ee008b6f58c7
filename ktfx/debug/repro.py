"""A failure as a directory that anyone can run: what was asked, the graph, the pipeline, the environment, the error.

    repro.json    the model, options and versions; the error and the regular expression that tells it again
    rules.yaml    the rules as they were
    pipeline.json the resolved pipeline, each value with its place
    graph.py      the captured graph as a program, its inputs as shapes and dtypes (inputs.pt: as tensors, if asked)
    error.txt     the traceback
    run.sh        the command that fails

It is written whole or not at all, and never over something that is there.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from ktfx.debug.dump import packed_texts, program_text
from ktfx.debug.pipeline import resolved_pipeline
from ktfx.debug.session import Session, Setup, run, run_unrewritten
from ktfx.debug.snapshot import snapshot
from ktfx.debug.trace_dir import saved_inputs, versions
from ktfx.errors import KtfxError, OptionError
from ktfx.ruleset import read_source
from ktfx.yaml_source import plain

VERSION = 1


@dataclass(frozen=True)
class Failure:
    """What went wrong: the exception's kind, its first line, and its traceback."""

    kind: str
    message: str
    trace: str

    @property
    def pattern(self) -> str:
        """A regular expression that tells this failure again: the first line, with numbers left open."""
        return re.sub(r"\d+", r"\\d+", re.escape(f"{self.kind}: {self.message}"))


def failure_of(setup: Setup) -> Failure | None:
    """Compile and run; the failure, or None. Bad options and rules that cannot be read are the caller's: they raise."""
    try:
        run(setup)
    except OptionError:
        raise
    except Exception as error:
        text = error.what if isinstance(error, KtfxError) else str(error)
        first = next((line.strip() for line in text.splitlines() if line.strip()), "")
        return Failure(type(error).__name__, first[:300], traceback.format_exc())
    finally:
        torch._dynamo.reset()
    return None


def rules_data(setup: Setup) -> Any:
    """The rules as plain data: what a reduced rule file is made from."""
    return None if setup.rules is None else plain(read_source(setup.rules))


def write_repro(setup: Setup, failure: Failure, directory: Path, *, save_inputs: bool = False) -> Path:
    """Write the directory. OptionError if it is there already; nothing is left behind if anything fails half-way."""
    if directory.exists():
        raise OptionError(f"{directory} exists", expected="a directory that does not", mend="give -o another name")
    directory.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        _fill(draft, setup, failure, save_inputs)
        os.rename(draft, directory)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return directory


def _fill(folder: Path, setup: Setup, failure: Failure, save_inputs: bool) -> None:
    stored = asdict(replace(setup, rules=None))
    about = {
        "ktfx_repro": VERSION,
        "setup": stored,
        "error": {"kind": failure.kind, "message": failure.message, "pattern": failure.pattern},
        "versions": versions(),
        "environment": {k: v for k, v in os.environ.items() if k.startswith(("KTFX_", "TORCH_", "TORCHINDUCTOR_"))},
    }
    if setup.rules is not None:
        (folder / "rules.yaml").write_text(yaml.safe_dump(rules_data(setup), sort_keys=False), encoding="utf-8")
        steps = [asdict(s) for s in resolved_pipeline(setup.rules)]
        (folder / "pipeline.json").write_text(json.dumps(steps, indent=1, default=str) + "\n", encoding="utf-8")
    session, missing = _captured(setup)
    if session is not None:
        graph = session.state.graphs[0]
        assert graph.context is not None
        gm = graph.records[0].graph_before
        assert gm is not None
        shot = snapshot(gm, graph.context.captured.inputs)
        text = program_text(shot, f"{graph.phase}: the graph as captured", packed_texts(shot, None, graph.inputs))
        (folder / "graph.py").write_text(text, encoding="utf-8")
        if save_inputs:
            torch.save(saved_inputs(graph, session.state), folder / "inputs.pt")
    else:
        about["no_graph"] = missing
    (folder / "error.txt").write_text(failure.trace, encoding="utf-8")
    (folder / "repro.json").write_text(json.dumps(about, indent=1, default=str) + "\n", encoding="utf-8")
    (folder / "run.sh").write_text('#!/bin/sh\ncd "$(dirname "$0")"\n' + command_of(setup) + "\n", encoding="utf-8")
    (folder / "run.sh").chmod(0o755)


def _captured(setup: Setup) -> tuple[Session | None, str]:
    """The graph, captured with every optional pass off; or why it cannot be had that way."""
    try:
        return run_unrewritten(replace(setup, verify=False, timeline=False, backend="eager")), ""
    except Exception as error:
        return None, f"capturing failed too: {type(error).__name__}: {error}"


def command_of(setup: Setup) -> str:
    """The ``ktfx repro`` command that runs this setup again, in the directory of ``rules.yaml``."""
    parts = ["ktfx", "repro", setup.model or "demo"]
    parts += ["--rules", "rules.yaml"] if setup.rules is not None else []
    if isinstance(setup.simulate, Mapping):
        parts += ["--simulate", ",".join(f"{k}={v}" for k, v in setup.simulate.items())]
    elif setup.simulate:
        parts += ["--simulate", setup.simulate]
    parts += ["--layers", str(setup.layers)] if setup.layers is not None else []
    parts += ["--dtype", setup.dtype] if setup.dtype else []
    parts += [flag for flag, on in (("--tiny", setup.tiny), ("--verify", setup.verify)) if on]
    parts += [
        "--tokens",
        str(setup.tokens),
        "--phase",
        setup.phase,
        "--backend",
        setup.backend,
        "--seed",
        str(setup.seed),
    ]
    return shlex.join([*parts, "-o", "again"])


def read_repro(directory: Path) -> tuple[Setup, str]:
    """The setup of a repro and the regular expression of its error."""
    try:
        about = json.loads((directory / "repro.json").read_text(encoding="utf-8"))
        if about.get("ktfx_repro") != VERSION:
            raise ValueError(f"version {about.get('ktfx_repro')!r}, not {VERSION}")
        setup = Setup(**about["setup"])
        pattern = str(about["error"]["pattern"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OptionError(f"{directory} is no repro: {error}", mend="write one with `ktfx repro … -o DIR`") from None
    rules = directory / "rules.yaml"
    if rules.is_file():
        setup = replace(setup, rules=yaml.safe_load(rules.read_text(encoding="utf-8")))
    return setup, pattern
