"""A failure as a directory that anyone can run: what was asked, the graph, the pipeline, the environment, the error.

    repro.json    the error and the regular expression that tells it again; versions, environment, the command; the
                  model and options, where `ktfx repro` was asked for a model
    rules.yaml    the rules; pipeline.json: the resolved pipeline, each value with its place
    graph.py      the captured graph as a program, its inputs as shapes, dtypes and small integers
    graph.json    the same as data, modules.pkl: the module tree without weights; with both the failure comes back
                  without the model: `python run.py`
    inputs.pt     tensors that the graph holds itself, and all that it was called with where that was asked for
    error.txt     the traceback
    run.sh        the `ktfx repro` command that fails, where there is a model

It is written whole or not at all, and never over something that is there.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from ktfx.debug.case import GRAPH, INPUTS, MODULES, RULES, Case, case_text, load_case, saved_tensors
from ktfx.debug.dump import packed_texts, program_text
from ktfx.debug.failure import Failure, failure_from
from ktfx.debug.module_tree import to_bytes
from ktfx.debug.pipeline import resolved_pipeline
from ktfx.debug.session import Session, Setup, run, run_unrewritten, words_of
from ktfx.debug.snapshot import snapshot
from ktfx.debug.trace_dir import versions
from ktfx.errors import KtfxError, OptionError
from ktfx.ruleset import read_source
from ktfx.state import ModelState, default_rules
from ktfx.yaml_source import plain

VERSION = 2
_RUN = """\
\"\"\"The failure again, without the model: python run.py (needs ktfx; exit code 1 if it fails as it did).\"\"\"

from ktfx.debug.case import main

if __name__ == "__main__":
    main(__file__)
"""


def failure_of(
    setup: Setup, repro_dir: Path | None = None, every_tensor: bool = False
) -> tuple[Failure, Path | None] | None:
    """Compile and run; the failure and the repro of its graph, or None if nothing fails.

    repro_dir: where the repro goes; without it, or where no graph was captured, there is none. every_tensor: it holds
    the weights too. Bad options, and rules
    that cannot be read, are the caller's: they raise.
    """
    try:
        run(setup, repro_dir=None if repro_dir is None else str(repro_dir), repro_inputs=every_tensor)
    except OptionError:
        raise
    except Exception as error:
        inner = getattr(error, "inner_exception", None) or error
        found = getattr(inner, "repro", None)
        return failure_from(error), Path(found) if found else None
    finally:
        torch._dynamo.reset()
    return None


def rules_data(setup: Setup) -> Any:
    """The rules as plain data: what a reduced rule file is made from."""
    return None if setup.rules is None else plain(read_source(setup.rules))


def rules_of(state: ModelState) -> Any:
    """The rules that a model was compiled by, as plain data."""
    rules = state.options.rules
    return plain(read_source(rules if rules is not None else default_rules(state.store.model)))


# ---- writing


def write_whole(directory: Path, fill: Callable[[Path], None]) -> Path:
    """A directory that ``fill`` writes, whole or not at all. OptionError if something is there already."""
    if directory.exists() or directory.is_symlink():
        raise OptionError(f"{directory} exists", expected="a directory that does not", mend="give -o another name")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    except OSError as error:
        raise OptionError(
            f"{directory} cannot be made: {error}", expected="a name in a directory that can be written to"
        ) from None
    try:
        fill(draft)
        draft.chmod(0o755)
        os.rename(draft, directory)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return directory


def free_name(directory: Path, name: str) -> Path:
    """``directory/name``, with a number after it if that is taken."""
    path, number = directory / name, 1
    while path.exists():
        number += 1
        path = directory / f"{name}-{number}"
    return path


def write_case(
    case: Case,
    failure: Failure,
    directory: Path,
    *,
    every_tensor: bool = False,
    command: Sequence[str] = (),
    setup: Setup | None = None,
) -> Path:
    """The repro of a captured graph. every_tensor: keep all that it was called with. setup: a model that shows it."""

    def fill(folder: Path) -> None:
        more: dict[str, Any] = {"stage": case.stage, "command": list(command)}
        try:
            modules = to_bytes(case.captured.model)
        except Exception as error:
            # Then graph.py is what there is: it runs, but the passes cannot run on it without the module tree.
            more["no_modules"] = f"the module tree cannot be pickled: {type(error).__name__}: {error}"
        else:
            (folder / MODULES).write_bytes(modules)
            (folder / GRAPH).write_text(case_text(case), encoding="utf-8")
            (folder / "run.py").write_text(_RUN, encoding="utf-8")
        _write_rules(folder, case.rules)
        tensors = saved_tensors(case, every_tensor)
        if tensors:
            torch.save(tensors, folder / INPUTS)
        (folder / "graph.py").write_text(_program(case), encoding="utf-8")
        _write_about(folder, failure, setup, more)

    return write_whole(directory, fill)


def _program(case: Case) -> str:
    shot = snapshot(case.captured.gm, case.captured.inputs)
    texts = packed_texts(shot, None, {**case.captured.constants, **case.values})
    return program_text(shot, f"{case.captured.phase}: the graph as captured", texts)


def write_repro(setup: Setup, failure: Failure, directory: Path, *, found: Path | None = None) -> Path:
    """The repro of a model under a setup. found: the repro of its graph, where one was captured; it is taken over.

    OptionError if the directory is there already; nothing is left behind if anything fails half-way.
    """

    def fill(folder: Path) -> None:
        more: dict[str, Any] = {}
        if found is not None:
            shutil.copytree(found, folder, dirs_exist_ok=True)
            about = json.loads((found / "repro.json").read_text(encoding="utf-8"))
            more = {key: about[key] for key in ("stage", "command")}
        else:
            if setup.rules is not None:
                _write_rules(folder, rules_data(setup))
            session, missing = _captured(setup)
            if session is None:
                more["no_graph"] = missing
            else:
                (folder / "graph.py").write_text(_captured_program(session), encoding="utf-8")
        _write_about(folder, failure, setup, more)

    return write_whole(directory, fill)


def _write_rules(folder: Path, data: Any) -> None:
    (folder / RULES).write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    try:
        steps = [asdict(s) for s in resolved_pipeline(data)]
    except KtfxError as error:
        steps = [{"error": str(error)}]
    (folder / "pipeline.json").write_text(json.dumps(steps, indent=1, default=str) + "\n", encoding="utf-8")


def _write_about(folder: Path, failure: Failure, setup: Setup | None, more: dict[str, Any]) -> None:
    about = {
        "ktfx_repro": VERSION,
        "setup": asdict(replace(setup, rules=None)) if setup is not None else None,
        "error": {"kind": failure.kind, "message": failure.message, "pattern": failure.pattern},
        "versions": versions(),
        "environment": {k: v for k, v in os.environ.items() if k.startswith(("KTFX_", "TORCH_", "TORCHINDUCTOR_"))},
        **more,
    }
    (folder / "error.txt").write_text(failure.trace, encoding="utf-8")
    (folder / "repro.json").write_text(json.dumps(about, indent=1, default=str) + "\n", encoding="utf-8")
    if setup is not None:
        text = '#!/bin/sh\ncd "$(dirname "$0")"\n' + command_of(setup) + "\n"
        (folder / "run.sh").write_text(text, encoding="utf-8")
        (folder / "run.sh").chmod(0o755)


def _captured_program(session: Session) -> str:
    graph = session.compiled[0]
    gm = graph.records[0].graph_before
    assert graph.context is not None and gm is not None
    shot = snapshot(gm, graph.context.captured.inputs)
    return program_text(shot, f"{graph.phase}: the graph as captured", packed_texts(shot, None, graph.inputs))


def _captured(setup: Setup) -> tuple[Session | None, str]:
    """The graph, captured with every optional pass off; or why it cannot be had that way."""
    try:
        return run_unrewritten(replace(setup, verify=False, timeline=False, backend="eager")), ""
    except Exception as error:
        return None, f"capturing failed too: {type(error).__name__}: {error}"


def command_of(setup: Setup) -> str:
    """The ``ktfx repro`` command that runs this setup again, in the directory of ``rules.yaml``."""
    words = words_of("repro", setup, "rules.yaml" if setup.rules is not None else None)
    words += ["--verify"] if setup.verify else []
    for name, value in (("--phase", setup.phase), ("--backend", setup.backend)):
        words += [name, value] if name not in words else []
    return shlex.join([*words, "-o", "again"])


# ---- reading


@dataclass(frozen=True)
class Repro:
    """A repro directory, read back.

    setup: the model and options, if it has them. case: the graph, if it has one; lacking: else why not.
    """

    setup: Setup | None
    case: Case | None
    pattern: str
    lacking: str


def read_repro(directory: Path) -> Repro:
    """OptionError if the directory is no repro of this version."""
    try:
        about = json.loads((directory / "repro.json").read_text(encoding="utf-8"))
        if about.get("ktfx_repro") != VERSION:
            raise ValueError(f"version {about.get('ktfx_repro')!r}, not {VERSION}")
        setup = Setup(**about["setup"]) if about["setup"] is not None else None
        pattern = str(about["error"]["pattern"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OptionError(f"{directory} is no repro: {error}", mend="write one with `ktfx repro … -o DIR`") from None
    rules = directory / RULES
    if setup is not None and rules.is_file():
        setup = replace(setup, rules=yaml.safe_load(rules.read_text(encoding="utf-8")))
    lacking = str(about.get("no_modules") or about.get("no_graph") or "none was captured")
    return Repro(setup, read_case(directory), pattern, lacking)


def read_case(directory: Path) -> Case | None:
    """The graph of a repro, if it holds one."""
    return load_case(directory) if (directory / GRAPH).is_file() else None
