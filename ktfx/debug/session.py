"""One compile and one run of a model with the record kept: what every debugging command starts from."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import ktfx
from ktfx.errors import OptionError
from ktfx.options import RulesSource
from ktfx.state import GraphReport, ModelState
from ktfx.text import human_bytes

PHASES = ("prefill", "generate", "both")
_MOST_RANDOM_BYTES = 4 * 1024**3
_TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "num_experts": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "vocab_size": 256,
    "max_position_embeddings": 512,
}


@dataclass(frozen=True)
class Setup:
    """What to compile and run.

    model: as ``--model`` names it; None is the demo model. layers: keep only the first so many; tiny: small widths
    (both give random weights). tokens: length of the prompt, drawn with ``seed``. phase: ``prefill``, ``generate`` or
    ``both``. backend: what compiles the partitions. timeline: time the steps of a second run.
    """

    model: str | None = None
    rules: RulesSource = None
    simulate: str | Mapping[str, str] | None = None
    layers: int | None = None
    tiny: bool = False
    dtype: str | None = None
    tokens: int = 8
    phase: str = "prefill"
    backend: str = "eager"
    seed: int = 0
    verify: bool = False
    timeline: bool = False


def words_of(command: str, setup: Setup, rules: str | None) -> list[str]:
    """``ktfx COMMAND`` with this setup as its options; options at their defaults are left out."""
    simulate = setup.simulate
    if isinstance(simulate, Mapping):
        simulate = ",".join(f"{k}={v}" for k, v in simulate.items())
    options: dict[str, Any] = {
        "--rules": rules,
        "--simulate": simulate,
        "--layers": setup.layers,
        "--dtype": setup.dtype,
        "--tokens": setup.tokens if setup.tokens != Setup.tokens else None,
        "--phase": setup.phase if setup.phase != Setup.phase else None,
        "--seed": setup.seed if setup.seed != Setup.seed else None,
    }
    words = ["ktfx", command, setup.model or "demo", *(["--tiny"] if setup.tiny else [])]
    return words + [str(w) for name, value in options.items() if value is not None for w in (name, value)]


@dataclass
class Session:
    """A model that was compiled and run once. compiled: its graphs, in the order of the compiles."""

    setup: Setup
    model: nn.Module
    state: ModelState
    outputs: Any = None
    compiled: list[GraphReport] = field(default_factory=list)

    def __post_init__(self) -> None:
        # A list of its own: torch._dynamo.reset() empties the state's.
        self.compiled = list(self.state.graphs)

    @property
    def graphs(self) -> list[GraphReport]:
        """The graphs of the phases asked for, in the order of their compiles."""
        wanted = ("prefill", "generate") if self.setup.phase == "both" else (self.setup.phase,)
        return [g for g in self.compiled if g.phase in wanted]


def open_model(setup: Setup) -> nn.Module:
    """The model that a setup names, on the cpu; random weights for ``layers``, ``tiny`` or a bare config."""
    from ktfx.cli.models import find_model, load_config, load_model

    source = find_model(setup.model)
    if source.folder is not None and setup.layers is None and not setup.tiny:
        model: nn.Module = load_model(source)
        return model.to(_dtype(setup.dtype)) if setup.dtype else model
    return random_model(load_config(source), setup)


def random_model(config: Any, setup: Setup) -> nn.Module:
    from transformers import AutoModelForCausalLM

    if setup.tiny:
        for name, value in _TINY.items():
            if getattr(config, name, None) is not None:
                setattr(config, name, value)
        if hasattr(config, "kv_lora_rank") and hasattr(config, "num_key_value_heads"):
            config.num_key_value_heads = config.num_attention_heads
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if getattr(config, name, None) is not None:
                setattr(config, name, None)
    if setup.layers is not None:
        if setup.layers < 1:
            raise OptionError(f"--layers {setup.layers}", expected="a positive number of layers")
        config.num_hidden_layers = setup.layers
        if getattr(config, "layer_types", None):
            config.layer_types = list(config.layer_types)[: setup.layers]
    dtype = _dtype(setup.dtype or "float32")
    with torch.device("meta"):
        probe = AutoModelForCausalLM.from_config(config)
    size = sum(p.numel() for p in probe.parameters()) * dtype.itemsize
    if size > _MOST_RANDOM_BYTES:
        raise OptionError(
            f"random weights of this shape would take {human_bytes(size)}",
            expected=f"at most {human_bytes(_MOST_RANDOM_BYTES)}",
            mend="add --tiny (small widths, the same structure) or --layers N",
        )
    torch.manual_seed(setup.seed)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise OptionError(f"unknown dtype {name!r}", expected="float32, bfloat16, float16 or float64")
    return found


def run(setup: Setup, model: nn.Module | None = None, **options: Any) -> Session:
    """Compile the model by the rules and run it: one prompt, and one more token if the generate phase is asked for.

    options: further ones of ``ktfx.compile`` (``repro_dir``, ``pack_cache``).
    """
    if setup.phase not in PHASES:
        raise OptionError(f"unknown phase {setup.phase!r}", expected="prefill, generate or both")
    model = model if model is not None else open_model(setup)
    ids = prompt(model, setup)
    ktfx.compile(
        model,
        setup.rules,
        simulate=setup.simulate,
        partition_backend=setup.backend,
        keep_graphs=True,
        verify=setup.verify,
        **options,
    )
    outputs = generate(model, ids, setup)
    session = Session(setup, model, ktfx.state_of(model), outputs)
    if setup.timeline:
        _time(session, ids)
    return session


def run_unrewritten(setup: Setup, model: nn.Module | None = None) -> Session:
    """``run`` with every optional pass off: it captures the graph and its inputs even where a pass would fail."""
    limits = {"KTFX_BISECT_PASSES": "0", "KTFX_BISECT_LIMIT": None}
    with environment(limits), contextlib.redirect_stdout(io.StringIO()):
        return run(setup, model)


@contextlib.contextmanager
def environment(variables: Mapping[str, str | None]) -> Iterator[None]:
    """These variables for the length of a block; None takes one away."""
    before = {name: os.environ.get(name) for name in variables}

    def put(values: Mapping[str, str | None]) -> None:
        for name, value in values.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    put(variables)
    try:
        yield
    finally:
        put(before)


def prompt(model: nn.Module, setup: Setup) -> torch.Tensor:
    """(1, tokens) int64 ids, the same for a seed."""
    vocabulary = int(getattr(getattr(model, "config", None), "vocab_size", 0) or 2)
    seeded = torch.Generator().manual_seed(setup.seed)
    return torch.randint(0, vocabulary, (1, setup.tokens), generator=seeded)


def generate(model: nn.Module, ids: torch.Tensor, setup: Setup) -> Any:
    count = 1 if setup.phase == "prefill" else 2
    # Dynamo remembers by source line that another model saw another length: a session is as in a fresh process.
    with torch.no_grad(), torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        return model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )


def run_module(model: nn.Module, args: Sequence[Any], rules: RulesSource, **options: Any) -> Session:
    """Compile any module and call it once with ``args``."""
    ktfx.compile(model, rules, keep_graphs=True, **{"partition_backend": "eager", **options})
    with torch.no_grad():
        outputs = model(*args)
    return Session(Setup(phase="both"), model, ktfx.state_of(model), outputs)


def _time(session: Session, ids: torch.Tensor) -> None:
    """A second run with every step timed; only the first call of each program is kept."""
    for graph in session.compiled:
        graph.built.program.timeline = []
    generate(session.model, ids, session.setup)
    for graph in session.compiled:
        program = graph.built.program
        if program.timeline is not None:
            program.timeline = program.timeline[: len(program.steps)]
