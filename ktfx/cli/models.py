"""From what the user calls a model (a directory, a config.json, a shape) to the model, with weights or on ``meta``."""

from __future__ import annotations

import contextlib
import json
import struct
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktfx.errors import Origin, WeightError
from ktfx.text import human_bytes, near

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase
    from transformers.modeling_utils import PreTrainedModel

DEMO = "demo"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_HEADER_LIMIT = 100_000_000  # safetensors' own limit on its header


@dataclass(frozen=True)
class ModelSource:
    """name: as the user gave it. config: the config.json. folder: the model's directory, where one was given."""

    name: str
    config: Path
    folder: Path | None = None


def shipped_shapes() -> dict[str, Path]:
    """Name → config.json of the published models whose shapes ship with ktfx."""
    root = Path(str(resources.files("ktfx"))) / "shapes"
    return {path.parent.name: path for path in sorted(root.glob("*/config.json"))}


def find_model(name: str | None) -> ModelSource:
    """What ``--model`` names; None is the model that ships. WeightError if there is no such thing."""
    from ktfx.demo import demo_model_path

    if name is None or name == DEMO:
        return ModelSource(DEMO, demo_model_path() / "config.json", demo_model_path())
    path = Path(name)
    if path.is_dir():
        config = path / "config.json"
        if not config.is_file():
            raise WeightError(
                "the directory has no config.json",
                origin=Origin(str(path)),
                expected="a Hugging Face model directory",
                mend="name the directory that config.json lies in",
            )
        return ModelSource(name, config, path)
    if path.is_file():
        return ModelSource(name, path, None)
    shapes = shipped_shapes()
    if name in shapes:
        return ModelSource(name, shapes[name], None)
    raise WeightError(
        f"no such model: {name!r}{near(name, [DEMO, *shapes])}",
        expected="a model directory, a config.json, or one of " + ", ".join([DEMO, *shapes]),
        mend="ktfx downloads nothing: fetch the model first, then name its directory",
    )


def load_config(source: ModelSource) -> PretrainedConfig:
    """The configuration, read without running any code of the model's own."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    data = _read_json(source.config)
    kind = data.get("model_type")
    origin = Origin(str(source.config))
    if kind is None:
        raise WeightError("no model_type in it", origin=origin, expected="a transformers config.json")
    if kind not in CONFIG_MAPPING:
        # A model may bear a name of its own and the architecture of another (Kimi-K2: DeepSeek-V3's).
        known = next(filter(None, map(_model_type_of, data.get("architectures") or [])), None)
        if known is None:
            import transformers

            raise WeightError(
                f"transformers {transformers.__version__} knows no model_type {kind!r}{near(kind, CONFIG_MAPPING)}",
                origin=origin,
                mend="correct it, or install a transformers that has this model",
            )
        kind = known
    try:
        return CONFIG_MAPPING[kind].from_dict({**data, "model_type": kind})
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise WeightError(
            f"not a {kind} configuration: {error}",
            origin=origin,
            expected="what transformers writes for this model_type",
        ) from error


def _model_type_of(architecture: str) -> str | None:
    """The model_type that a causal model's class is named after, or else the first that has it; None for others."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kinds = [key for key, cls in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if cls == architecture]
    own = (key for key in kinds if architecture.lower().startswith(key.replace("_", "")))
    return next(own, kinds[0] if kinds else None)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise WeightError(f"not JSON: {error.msg}", origin=Origin(str(path), error.lineno, error.colno)) from error
    except (OSError, UnicodeDecodeError) as error:
        raise WeightError(f"cannot be read: {error}", origin=Origin(str(path))) from error
    if not isinstance(data, dict):
        raise WeightError(f"a JSON {type(data).__name__}, not an object", origin=Origin(str(path)))
    return data


def meta_model(source: ModelSource) -> PreTrainedModel:
    """The model on the meta device: all modules, no weights; quantised where the directory's own weights are."""
    import torch
    from transformers import AutoModelForCausalLM

    from ktfx.stored_loading import stored_load

    config = load_config(source)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config).eval()
        if source.folder is not None and any(source.folder.glob("*.safetensors")):
            # What ktfx cannot load can still be placed; explain then says for which dtype it counts.
            with contextlib.suppress(WeightError):
                stored_load(model, config, source.folder, model.dtype)
        return model
    except (ValueError, TypeError, AttributeError, ZeroDivisionError, RuntimeError, KeyError) as error:
        raise WeightError(
            f"transformers makes no language model of this {config.model_type} configuration: {_first_line(error)}",
            origin=Origin(str(source.config)),
        ) from error


def load_model(source: ModelSource) -> PreTrainedModel:
    """The model with its weights, on the cpu and in the dtype of its configuration. WeightError if any is missing."""
    import torch
    from transformers import AutoModelForCausalLM

    from ktfx.stored_loading import stored_load

    folder = _folder(source)
    check_weights(folder)
    config = load_config(source)
    if getattr(config, "quantization_config", None) is not None:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config).eval()
        stored = stored_load(skeleton, config, folder, skeleton.dtype)
        assert stored is not None
        return stored.finish(stored.load(), {}).eval()  # type: ignore[return-value]
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder, config=config, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise WeightError(
            f"transformers cannot load the model: {_first_line(error)}", origin=Origin(str(folder))
        ) from error
    missing = sorted(loading["missing_keys"])
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise WeightError(
            f"the checkpoint lacks weights of the model: {', '.join(missing[:3])}{more}",
            origin=Origin(str(folder)),
            mend="use the checkpoint that config.json belongs to",
        )
    return model.eval()


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The directory's tokenizer."""
    from transformers import AutoTokenizer

    folder = _folder(source)
    config = load_config(source)  # read first: transformers reads it too, and says less of what is wrong
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise WeightError(
            "the directory has no tokenizer",
            origin=Origin(str(folder)),
            expected="tokenizer.json (or " + ", ".join(_TOKENIZER_FILES[1:]) + ")",
            mend="copy the tokenizer files of the model into the directory",
        )
    try:
        return AutoTokenizer.from_pretrained(folder, config=config, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise WeightError(f"the tokenizer cannot be read: {_first_line(error)}", origin=Origin(str(folder))) from error


def _folder(source: ModelSource) -> Path:
    if source.folder is None:
        raise WeightError(
            f"{source.name} is a configuration without weights",
            origin=Origin(str(source.config)),
            expected="a model directory with safetensors files",
            mend="`ktfx explain` and `ktfx resolve` need no weights; `ktfx run` does",
        )
    return source.folder


def check_weights(folder: Path) -> None:
    """WeightError for a directory without weights, a shard that is not there, or a file that was cut off.

    Reads the headers only; formats other than safetensors are left to transformers.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted({str(v) for v in (_read_json(index).get("weight_map") or {}).values()})
        absent = [name for name in shards if not (folder / name).is_file()]
        if absent or not shards:
            raise WeightError(
                f"{len(absent)} of {len(shards)} weight files that the index names are not there: "
                + ", ".join(absent[:3])
                if shards
                else "the index names no weight files",
                origin=Origin(str(index)),
                mend="fetch the rest of the checkpoint",
            )
        files = [folder / name for name in shards]
    else:
        files = [folder / "model.safetensors"] if (folder / "model.safetensors").is_file() else []
    if not files and not any(folder.glob("pytorch_model*.bin")):
        raise WeightError(
            "the directory has a config.json but no weights",
            origin=Origin(str(folder)),
            expected="model.safetensors, or shards with model.safetensors.index.json",
            mend="fetch the checkpoint; `ktfx explain` and `ktfx resolve` need no weights",
        )
    for file in files:
        check_safetensors(file)


def check_safetensors(path: Path) -> None:
    """WeightError if the file's length is not what its header says."""
    origin, size = Origin(str(path)), path.stat().st_size
    again = "fetch the file again"
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise WeightError(f"{size} bytes are no safetensors file", origin=origin, mend=again)
        (length,) = struct.unpack("<Q", prefix)
        if length > _HEADER_LIMIT:
            raise WeightError(
                "not a safetensors file: its header would be larger than allowed", origin=origin, mend=again
            )
        text = file.read(length)
    if len(text) < length:
        raise WeightError(
            f"the file is cut off inside its header: {human_bytes(size)} of more than {human_bytes(8 + length)}",
            origin=origin,
            mend=again,
        )
    try:
        header = json.loads(text)
        end = max((int(v["data_offsets"][1]) for k, v in header.items() if k != "__metadata__"), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise WeightError(
            "not a safetensors file: its header is no JSON of tensors", origin=origin, mend=again
        ) from error
    if size != 8 + length + end:
        word = "cut off" if size < 8 + length + end else "too long"
        raise WeightError(
            f"the file is {word}: {size} bytes where its header says {8 + length + end}", origin=origin, mend=again
        )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
