"""``ktfx.from_pretrained``: a Hugging Face directory straight to its places.

transformers' own loader reads (and converts) the checkpoint; the rules give it a device map, so that a weight goes from
the file to its device without a stop on the host. The parameters then become PlacedTensors on the logical device.
What a checkpoint stores quantised ktfx reads itself (``ktfx.stored_checkpoint``), and keeps its bits.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ktfx.budget import check_budget
from ktfx.devices import DeviceMap, device_map
from ktfx.errors import KtfxError, OptionError, WeightError
from ktfx.linear_rules import only_packed
from ktfx.options import RulesSource, parse_options
from ktfx.resolve import Resolution, resolve
from ktfx.ruleset import load_ruleset
from ktfx.state import default_rules, name_of_logical
from ktfx.stored_loading import stored_load

# Arguments that ktfx.compile names; the rest are CompileOptions.
_OF_COMPILE = ("cache", "release_host", "dynamic", "direct_calls")


def from_pretrained(
    path: str | Path,
    rules: RulesSource = None,
    *,
    dtype: torch.dtype | str = "auto",
    model_class: Any = None,
    **options: Any,
) -> nn.Module:
    """Load a model directory and compile it: ``ktfx.compile(AutoModelForCausalLM.from_pretrained(path), rules)``, with
    every weight loaded where the rules put it.

    Layers and experts that the checkpoint stores quantised (fp8 blocks, mxfp4, GPTQ, AWQ, compressed-tensors of 4 bits)
    become ``StoredLinear`` and ``StoredExperts``, which run on the stored bits; no other package is needed for that.
    Experts that a kernel packs exist only packed where ``state_dict()`` can still return them (``release_host="exact"``
    unless given).

    dtype: as transformers takes it. model_class: AutoModelForCausalLM unless given. options: as for ``ktfx.compile``.
    Before a byte is read: WeightError for a directory without weights or with a truncated file, and for a quantised
    checkpoint that ktfx does not read; PlacementError for a device too small.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from ktfx.api import compile
    from ktfx.ops import load_ops

    directory = check_checkpoint(path)
    cls = model_class or AutoModelForCausalLM
    compile_options = {k: options.pop(k) for k in _OF_COMPILE if k in options}
    compile_options.setdefault("release_host", "exact")
    parsed = parse_options({"rules": rules, **options})
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightError(
            f"{directory}/config.json cannot be read: {first}",
            expected="a config.json of a model type that transformers knows",
            mend="fetch the file again, or install a transformers that has this model",
        ) from error
    load_ops()
    chosen_dtype = _dtype(dtype, config)
    with torch.device("meta"):
        skeleton = cls.from_config(config, dtype=chosen_dtype).eval()
    stored = stored_load(skeleton, config, directory, chosen_dtype)
    chosen = parsed.rules if parsed.rules is not None else default_rules(skeleton)
    ruleset = load_ruleset(chosen)
    resolution = resolve(ruleset, skeleton)
    devices = device_map(ruleset, parsed.simulate)
    logical = torch.device("cpu")
    logical_name = name_of_logical(ruleset, logical)
    check_budget(skeleton, resolution, devices, parsed.memory, logical_name)
    loader = stored.load if stored is not None else partial(cls.from_pretrained, directory, dtype=dtype)
    model = _load(loader, resolution, devices, skeleton)
    if stored is not None:
        stored.finish(model, _places(resolution, devices, skeleton))
    _place_parameters(model, resolution, devices, logical_name, logical)
    return compile(model, chosen, **compile_options, **options)


def check_checkpoint(path: str | Path) -> Path:
    """The directory, if it holds a config and whole safetensors files. Reads headers only."""
    directory = Path(path)
    if not directory.is_dir():
        raise WeightError(
            f"{directory} is no directory",
            expected="a Hugging Face model directory (config.json and *.safetensors)",
            mend="download the model first and give the directory it lies in",
        )
    if not (directory / "config.json").is_file():
        raise WeightError(f"{directory} has no config.json", expected="a Hugging Face model directory")
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise WeightError(
            f"{directory} holds no weights",
            expected="*.safetensors beside config.json",
            mend="download the weights too; `ktfx resolve` and `ktfx lint` need config.json alone",
        )
    for file in files:
        _check_safetensors(file)
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightError(f"{index} is no index of weights: {error!r}", mend="download the file again") from None
        missing = sorted(named - {f.name for f in files})
        if missing:
            raise WeightError(f"{directory} lacks {len(missing)} of its weight files: {', '.join(missing[:3])}")
    return directory


def _check_safetensors(file: Path) -> None:
    """The format: 8 bytes of header length, a JSON header, then the data up to the largest offset in it."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if len(start) < 8:
            raise WeightError(f"{file} is truncated: {size} bytes", mend="download the file again")
        (length,) = struct.unpack("<Q", start)
        if length > size - 8:
            raise WeightError(
                f"{file} is truncated or no safetensors file: its header says {length} bytes, the file has {size}",
                mend="download the file again",
            )
        try:
            header = json.loads(stream.read(length))
            end = max((int(e["data_offsets"][1]) for n, e in header.items() if n != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise WeightError(f"{file} has a broken header: {error!r}", mend="download the file again") from None
    if 8 + length + end != size:
        raise WeightError(
            f"{file} is truncated: {size} bytes, its header tells of {8 + length + end}", mend="download the file again"
        )


def _dtype(dtype: torch.dtype | str, config: Any) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return getattr(config, "dtype", None) or torch.float32
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise OptionError(f"dtype={dtype!r}", expected="'auto', or a dtype such as torch.bfloat16 or 'bfloat16'")
    return found


def _places(resolution: Resolution, devices: DeviceMap, skeleton: nn.Module) -> dict[str, torch.device]:
    """Where each module's weights are to be loaded."""
    places = {path: devices[p.at("generate").device] for path, p in resolution.placements.items()}
    for path, placement in resolution.placements.items():
        if only_packed(skeleton.get_submodule(path), placement):
            places[path] = torch.device("cpu")  # packed from there
    return places


def _load(
    loader: Callable[..., nn.Module], resolution: Resolution, devices: DeviceMap, skeleton: nn.Module
) -> nn.Module:
    places = _places(resolution, devices, skeleton)
    if {str(devices[p.at("generate").device]) for p in resolution.placements.values()} == {"cpu"}:
        return loader().eval()
    try:
        import accelerate  # noqa: F401
    except ImportError:
        raise KtfxError(
            "loading straight to several devices needs accelerate, which transformers' loader uses",
            mend="pip install accelerate; or load on the cpu and call ktfx.compile(model, rules)",
        ) from None
    # Leaves only: a parent's entry would take its children along.
    leaves = {
        path: device
        for path, device in places.items()
        if path and not any(other.startswith(path + ".") for other in places)
    }
    model = loader(device_map={**_own_parameters(resolution, places), **leaves})
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(model, recurse=True)
    model.__dict__.pop("hf_device_map", None)
    return model.eval()


def _own_parameters(resolution: Resolution, places: dict[str, torch.device]) -> dict[str, torch.device]:
    """Modules with children and parameters of their own are rare; name them so that the map covers every weight."""
    return {
        p: d for p, d in places.items() if p and resolution.placements[p].role in ("experts", "router", "attention")
    }


def _place_parameters(
    model: nn.Module, resolution: Resolution, devices: DeviceMap, logical_name: str, logical: torch.device
) -> None:
    """Every parameter and buffer that is not on the logical device says it is, and holds its data where it lies."""
    from ktfx.release import place_module_tensors

    place_module_tensors(model, resolution, devices, logical_name, logical)
