"""Load a checkpoint that comes quantised: transformers' loader for the plain part, ktfx's own reader for the rest."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ktfx.checkpoint import open_checkpoint
from ktfx.checkpoint_schemes import scheme_of
from ktfx.errors import KtfxWarning, WeightError
from ktfx.stored_checkpoint import StoredPlan, fill, outline, plan_of, put_in


@dataclass(frozen=True)
class StoredLoad:
    """What it takes to load one quantised checkpoint.

    kind: the model's class. config: without the quantisation, which is ``quantization`` as config.json has it.
    """

    kind: type
    plan: StoredPlan
    directory: Path
    config: Any
    quantization: Any
    dtype: torch.dtype

    def load(self, **options: Any) -> nn.Module:
        """transformers' loader over a model with empty stand-ins; ``finish`` fills them. options: as it takes them.

        Raises WeightError if a weight of the model is neither plain nor quantised in the files.
        """
        kind, plan = self.kind, self.plan

        def build(model: Any, *args: Any, **kwargs: Any) -> None:
            kind.__init__(model, *args, **kwargs)  # type: ignore[misc]
            put_in(model, plan)
            ignored = set(model._keys_to_ignore_on_load_unexpected or ())
            model._keys_to_ignore_on_load_unexpected = ignored | plan.unexpected()

        # In the model's own module: transformers looks there for what the class can do.
        subclass: Any = type(kind.__name__, (kind,), {"__init__": build, "__module__": kind.__module__})
        model, loading = subclass.from_pretrained(
            self.directory, config=self.config, dtype=self.dtype, output_loading_info=True, **options
        )
        model.__class__ = kind
        del model._keys_to_ignore_on_load_unexpected
        missing = sorted(loading["missing_keys"])
        if missing:
            raise WeightError(
                f"{self.directory} lacks {len(missing)} weights of the model: {', '.join(missing[:3])}",
                expected=f"each weight plain, or quantised as config.json says ({', '.join(plan.scheme.leaves)})",
                mend="use the checkpoint that config.json belongs to",
            )
        assert isinstance(model, nn.Module)
        return model

    def finish(self, model: nn.Module, places: Mapping[str, torch.device]) -> nn.Module:
        """Read what is stored. places: module path → its device; the CPU for others."""
        fill(model, self.plan, places, self.dtype)
        setattr(model.config, "quantization_config", self.quantization)  # noqa: B010
        object.__setattr__(model, "save_pretrained", partial(_refuse_to_save, self.directory))
        return model


def stored_load(skeleton: nn.Module, config: Any, directory: Path, dtype: torch.dtype) -> StoredLoad | None:
    """How to load a directory whose config says that it is quantised, or None; puts stand-ins into the skeleton.

    skeleton: the model of ``config`` on the meta device. Reads headers only. Raises WeightError for a checkpoint that
    ktfx does not read; warns of quantised weights that no module takes.
    """
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return None
    plain = copy.deepcopy(config)
    del plain.quantization_config
    told = quantization if isinstance(quantization, dict) else quantization.to_dict()
    scheme, checkpoint = scheme_of(told, directory / "config.json"), open_checkpoint(directory)
    if checkpoint is None:
        raise WeightError(f"{directory} holds no weights that can be read", mend="download them again")
    plan = plan_of(skeleton, checkpoint, scheme)
    ignored = re.compile("|".join(getattr(skeleton, "_keys_to_ignore_on_load_unexpected", None) or ["(?!)"]))
    strange = [base for base in plan.without_module if not ignored.search(base)]
    if strange:
        warnings.warn(
            f"{directory}: {len(strange)} quantised weights belong to no module of the model and are not read "
            f"({', '.join(strange[:3])}{', …' if len(strange) > 3 else ''})",
            KtfxWarning,
            stacklevel=3,
        )
    put_in(skeleton, plan)
    outline(skeleton, plan, dtype)
    return StoredLoad(type(skeleton), plan, directory, plain, quantization, dtype)


def _refuse_to_save(directory: Path, *_: Any, **__: Any) -> None:
    raise WeightError(
        "a model whose weights a checkpoint stores quantised cannot be saved as a checkpoint again",
        expected="its own files, which hold the same bits",
        mend=f"copy {directory}; state_dict() gives the tensors as ktfx keeps them",
    )
