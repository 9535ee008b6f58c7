"""What ``torch.compile(..., options=…)`` and ``ktfx.compile(...)`` accept, validated in one place."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ktfx.errors import OptionError
from ktfx.program.compile_units import BACKENDS
from ktfx.text import near

RulesSource = str | Path | Mapping[str, Any] | Sequence[Any] | None

# torch.compile reads these from the same dict for itself.
_TORCH_KEYS = frozenset({"guard_filter_fn", "use_aoti"})
_SLIDING_CACHES = ("full", "window")
_MODES = (None, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class CompileOptions:
    """The options of one compile.

    rules: a path, the name of a shipped rule file, or the rules as Python objects; None picks the shipped file for the
        model's type and the devices that are there.
    simulate: ``"cpu"`` maps every other device name to the cpu; a mapping maps the names it gives.
    verify: after compiling, run each pass's graph against the one before on the first call's real inputs.
    partition_backend: ``inductor`` or ``eager``.
    query_input: the input whose second dimension is the query length, by a part of its name.
    memory: bytes that each device name may hold, e.g. ``{"cuda:0": "24GiB"}``; None asks the real device.
    keep_graphs: keep every pass's graph before and after (what ``verify`` and the trace read).
    repro_dir: on a failure in a pass, a compile or a run, write a repro into this directory and name it in the error
        (also KTFX_REPRO_DIR in the environment); calls then always go through Dynamo.
    repro_inputs: keep every tensor in a repro, weights too, not just shapes and small integers (KTFX_REPRO_INPUTS=1).
    cuda_graphs: record decode steps that repeat as CUDA graphs (through ``ktfx.compile``, on real GPUs).
    pack_cache: a directory where experts packed for the CPU are kept between runs; None keeps none.
    sliding_cache: ``full``: sliding-window layers of a static cache are as long as its full layers, so that decode
        steps can be called directly and recorded; ``window``: they hold their window alone (less memory, slower steps).
        Through ``ktfx.compile``.
    mode: accepted from transformers' CompileConfig; it chooses nothing here.
    """

    rules: RulesSource = None
    simulate: str | Mapping[str, str] | None = None
    verify: bool = False
    partition_backend: str = "inductor"
    query_input: str | None = None
    memory: Mapping[str, int] | None = None
    keep_graphs: bool = False
    repro_dir: str | None = None
    repro_inputs: bool = False
    cuda_graphs: bool = True
    pack_cache: str | Path | None = None
    sliding_cache: str = "full"
    mode: str | None = None
    key: str = field(default="", compare=False)


def parse_options(given: Mapping[str, Any] | None, mode: str | None = None) -> CompileOptions:
    """Check names and types. The dict is copied: torch.compile holds the user's own by reference and edits it."""
    options = {k: v for k, v in dict(given or {}).items() if k not in _TORCH_KEYS}
    known = [f.name for f in fields(CompileOptions) if f.name not in ("mode", "key")]
    for name in options:
        if name not in known:
            raise OptionError(
                f"unknown option {name!r}{near(name, known)}", expected="one of " + ", ".join(sorted(known))
            )
    if mode not in _MODES:
        raise OptionError(f"unknown mode {mode!r}", expected="one of " + ", ".join(str(m) for m in _MODES))
    _expect(options, "verify", bool)
    _expect(options, "keep_graphs", bool)
    _expect(options, "repro_inputs", bool)
    if options.get("repro_dir") is not None:
        options["repro_dir"] = _directory(options["repro_dir"])
    _expect(options, "cuda_graphs", bool)
    _expect(options, "query_input", str)
    backend = options.get("partition_backend", "inductor")
    if backend not in BACKENDS:
        raise OptionError(
            f"unknown partition_backend {backend!r}{near(str(backend), BACKENDS)}",
            expected="one of " + ", ".join(BACKENDS),
        )
    simulate = options.get("simulate")
    if simulate is not None and not isinstance(simulate, (str, Mapping)):
        raise OptionError(
            f"option 'simulate' is {simulate!r}",
            expected='a device such as "cpu", or a mapping of device names to devices',
        )
    if options.get("memory") is not None:
        options["memory"] = {str(k): parse_bytes(v) for k, v in dict(options["memory"]).items()}
    if options.get("pack_cache") is not None:
        options["pack_cache"] = checked_directory(options["pack_cache"])
    sliding = options.get("sliding_cache", "full")
    if sliding not in _SLIDING_CACHES:
        raise OptionError(
            f"unknown sliding_cache {sliding!r}{near(str(sliding), _SLIDING_CACHES)}",
            expected="one of " + ", ".join(_SLIDING_CACHES),
        )
    rules = options.get("rules")
    if rules is not None and not isinstance(rules, (str, Path, Mapping, Sequence)):
        raise OptionError(
            f"option 'rules' is a {type(rules).__name__}",
            expected="a path, the name of a shipped rule file, a mapping, or a list of KTransformers rules",
        )
    key = json.dumps(_with_text_keys(options), default=str, sort_keys=True)
    return CompileOptions(**options, mode=mode, key=key)


def _with_text_keys(value: Any) -> Any:
    """Mappings with their keys as text, so that they can be sorted (YAML's ``layers:`` mixes numbers and text)."""
    if isinstance(value, Mapping):
        return {str(k): _with_text_keys(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_text_keys(v) for v in value]
    return value


def _expect(options: Mapping[str, Any], name: str, kind: type) -> None:
    value = options.get(name)
    if value is not None and not isinstance(value, kind):
        raise OptionError(f"option {name!r} is {value!r}", expected=f"a {kind.__name__}")


def checked_directory(value: Any) -> Path:
    """The pack cache's directory, made if it is not there; OptionError if it cannot be one."""
    if not isinstance(value, (str, Path)) or not str(value):
        raise OptionError(f"option 'pack_cache' is {value!r}", expected="a directory")
    path = Path(value).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"option 'pack_cache': {path} is no directory and cannot be made: {error.strerror}") from None
    return path


def _directory(value: Any) -> str:
    if not isinstance(value, (str, Path)) or not str(value):
        raise OptionError(f"option 'repro_dir' is {value!r}", expected="the path of a directory")
    return str(value)


def parse_bytes(value: int | str) -> int:
    """``24GiB``, ``500MB``, 1024 → bytes."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(value), re.IGNORECASE)
    if not found:
        raise OptionError(f"{value!r} is no amount of memory", expected="a number of bytes, or text such as '24GiB'")
    base = 1024 if found[3] else 1000
    return int(float(found[1]) * base ** "KMGT".find(found[2].upper()) * base) if found[2] else int(float(found[1]))
