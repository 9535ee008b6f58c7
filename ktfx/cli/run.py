"""``ktfx run``: generate text with a model by a rule file, and show that it is eager's text and what ran where."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ktfx.cli import common
from ktfx.cli.models import DEMO, ModelSource, find_model, load_model, load_tokenizer
from ktfx.cli.placement import PlacementRow, device_colours, placement_rows, placement_table
from ktfx.cli.stream import TokenStream
from ktfx.errors import OptionError
from ktfx.text import human_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.modeling_utils import PreTrainedModel

    from ktfx.devices import DeviceMap
    from ktfx.state import ModelState

DEMO_RULES = "demo-2gpu-host"
_WARM_UP_TOKENS = 3  # one from the prefill graph, two from the decode graph
_STAGES = {
    "capture": "reading the graph",
    "passes": "rewriting",
    "pack": "packing weights",
    "compile": "compiling partitions",
}


class Backend(StrEnum):
    """What compiles the partitions."""

    INDUCTOR = "inductor"
    EAGER = "eager"


@dataclass(frozen=True)
class Generated:
    """One generation. prefill: seconds from the call to the first token. decode: seconds of the tokens after it."""

    ids: list[int]
    prompt_tokens: int
    prefill: float
    decode: float

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second."""
        return self.prompt_tokens / self.prefill

    @property
    def decode_rate(self) -> float | None:
        """Generated tokens a second after the first; None where only one was generated."""
        return (len(self.ids) - 1) / self.decode if len(self.ids) > 1 else None

    def to_json(self) -> dict[str, Any]:
        return {
            "prefill_seconds": self.prefill,
            "prefill_tokens_per_second": self.prefill_rate,
            "decode_seconds": self.decode,
            "decode_tokens_per_second": self.decode_rate,
        }


@dataclass(frozen=True)
class Outcome:
    """Everything that a run found out. eager: None under --no-check. module: held, as the state reads its weights."""

    source: ModelSource
    module: PreTrainedModel
    rules: str
    simulated: list[str]
    prompt: str
    text: str
    compiled: Generated
    eager: Generated | None
    compile_seconds: float
    state: ModelState
    rows: list[PlacementRow]

    @property
    def first_difference(self) -> int | None:
        """The position of the first generated token that is not eager's; None where all are equal."""
        if self.eager is None or self.eager.ids == self.compiled.ids:
            return None
        pairs = zip(self.eager.ids, self.compiled.ids, strict=False)
        shorter = min(len(self.eager.ids), len(self.compiled.ids))
        return next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)


@common.guarded
def run(
    model: Annotated[
        str, typer.Argument(metavar="[MODEL]", help="A model directory; without one, the small model that ships.")
    ] = DEMO,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to go on from.")] = "Raises ValueError if ",
    rules: Annotated[
        str | None,
        typer.Option("--rules", "-r", metavar="RULES", help="A rule file or a shipped name; without one, ktfx picks."),
    ] = None,
    simulate: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICE", help="Play the GPUs that the rules name on this one: cpu, or gpu0=cpu,gpu1=cuda:0."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="How many tokens to generate.")
    ] = 64,
    backend: Annotated[Backend, typer.Option(help="What compiles the partitions; eager runs them as they are.")] = (
        Backend.INDUCTOR
    ),
    verify: Annotated[
        bool, typer.Option("--verify", help="Check every pass's graph against the one before it, on the real inputs.")
    ] = False,
    no_check: Annotated[bool, typer.Option("--no-check", help="Do not generate with plain eager to compare.")] = False,
    as_json: common.Json = False,
    debug: common.Debug = False,
) -> None:
    """Generate text greedily, print it as it comes, then what ran where, and whether every token equals eager's.

    Exit code 1 if a token differs.
    """
    if not prompt:
        raise OptionError("the prompt is empty", expected="some text to go on from", mend='pass --prompt "The "')
    source = find_model(model)
    outcome = _generate(source, prompt, rules, simulate, max_new_tokens, backend, verify, not no_check, as_json)
    if as_json:
        common.print_json(_as_json(outcome))
    else:
        _print(outcome)
    if outcome.first_difference is not None:
        raise typer.Exit(common.Exit.NO)


def _generate(
    source: ModelSource,
    prompt: str,
    rules: str | None,
    simulate: str | None,
    count: int,
    backend: Backend,
    verify: bool,
    check: bool,
    quiet: bool,
) -> Outcome:
    console = common.stdout()
    with _progress() as progress:
        task = progress.add_task("importing torch", total=None)
        import ktfx
        from ktfx.devices import device_map
        from ktfx.ruleset import load_ruleset

        _hush_transformers()
        # The rules and the devices are read before the weights: a mistake in them costs no loading.
        ruleset = load_ruleset(rules) if rules is not None else None
        progress.update(task, description=f"loading {source.name}")
        tokenizer = load_tokenizer(source)
        if ruleset is not None:
            device_map(ruleset, simulate)
        module = load_model(source)
        if ruleset is None:
            rules = _chosen_rules(source, module)
            ruleset = load_ruleset(rules)
            simulate = simulate or (_demo_simulation() if source.name == DEMO else None)
        devices = device_map(ruleset, simulate)
        eager = None
        if check:
            progress.update(task, description="generating with plain eager, to compare")
            eager = _timed(module, tokenizer, prompt, count)
    assert rules is not None
    ktfx.compile(module, rules, simulate=simulate, partition_backend=str(backend), verify=verify)
    if not quiet:
        console.print(_headline(source, module, rules, devices), soft_wrap=True)
        console.print()
    with _progress() as progress, _showing_compiles(progress):
        start = time.perf_counter()
        _timed(module, tokenizer, prompt, count, stop_after=_WARM_UP_TOKENS)
        compile_seconds = time.perf_counter() - start

    pieces: list[str] = []

    def write(piece: str) -> None:
        pieces.append(piece)
        if not quiet:
            console.print(Text(piece), end="", soft_wrap=True)

    if not quiet:
        console.print(Text(prompt, "bold"), end="", soft_wrap=True)
    compiled = _timed(module, tokenizer, prompt, count, write=write)
    if not quiet:
        console.print("\n")
    state = ktfx.state_of(module)
    from ktfx.budget import plan_weights

    rows = placement_rows(state.resolution, plan_weights(module, state.resolution))
    simulated = [name for name in devices if _is_simulated(name, devices, state)]
    return Outcome(
        source, module, rules, simulated, prompt, "".join(pieces), compiled, eager, compile_seconds, state, rows
    )


def _timed(
    module: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    count: int,
    stop_after: int | None = None,
    write: Any = None,
) -> Generated:
    """Generate greedily. stop_after: stop after so many tokens, with a cache as long as for all of them."""
    import torch

    inputs = tokenizer(prompt, return_tensors="pt")
    if inputs.input_ids.shape[1] == 0:
        raise OptionError("the tokenizer makes no tokens of the prompt", mend="pass another --prompt")
    stream = TokenStream(lambda ids: tokenizer.decode(ids, skip_special_tokens=True), write or (lambda piece: None))
    options: dict[str, Any] = {}
    if module.generation_config.pad_token_id is None:
        end = module.generation_config.eos_token_id
        options["pad_token_id"] = end[0] if isinstance(end, list) else end
    if stop_after is not None:
        options["stopping_criteria"] = [lambda ids, scores, **_: _all(ids, len(stream.ids) >= stop_after)]
    start = time.perf_counter()
    with torch.no_grad():
        module.generate(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            max_new_tokens=count,
            do_sample=False,
            num_beams=1,
            streamer=stream,
            **options,
        )
    first = stream.times[0]
    return Generated(stream.ids, int(inputs.input_ids.shape[1]), first - start, stream.times[-1] - first)


def _all(ids: Any, value: bool) -> Any:
    import torch

    return torch.full((ids.shape[0],), value, dtype=torch.bool, device=ids.device)


def _chosen_rules(source: ModelSource, module: PreTrainedModel) -> str:
    if source.name == DEMO:
        return DEMO_RULES
    import torch

    from ktfx.rules_index import shipped_rules_for

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return shipped_rules_for(module.config.model_type, gpus, float(module.num_parameters()))


def _demo_simulation() -> str | None:
    """The demo's two GPUs on what is there: real ones, one real one for both, or the cpu."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {0: "cpu", 1: "cuda:0"}.get(count)


def _is_simulated(name: str, devices: DeviceMap, state: ModelState) -> bool:
    from ktfx.devices import written_device

    return str(devices[name]) != written_device(name, state.ruleset.devices)


def _hush_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on stderr that leaves nothing behind; silent where stderr is no terminal."""
    console = common.stderr()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield progress


@contextmanager
def _showing_compiles(progress: Progress) -> Iterator[None]:
    from ktfx.progress import listening

    task = progress.add_task("tracing the model", total=None)
    graphs = 0

    def show(stage: str, done: int, total: int) -> None:
        nonlocal graphs
        if stage == "capture":
            graphs += 1
            progress.reset(task)  # a finished bar's clock stands still
        text = f"graph {graphs}: {_STAGES.get(stage, stage)}" + (f" {done}/{total}" if total else "")
        progress.update(task, description=text, completed=done, total=total or None)

    with listening(show):
        yield


def _headline(source: ModelSource, module: PreTrainedModel, rules: str, devices: DeviceMap) -> Text:
    places = ", ".join(f"{name} = {devices[name]}" for name in devices if name != str(devices[name]))
    size = module.num_parameters()
    return Text.assemble(
        (source.name, "bold"),
        f"  {type(module).__name__}, {size / 1e6:.3g} M parameters, {str(module.dtype).removeprefix('torch.')}\n",
        ("rules ", "dim"),
        rules,
        ("  devices ", "dim"),
        places or ", ".join(devices),
    )


def _as_json(outcome: Outcome) -> dict[str, Any]:
    from ktfx.state import report_lines

    state = outcome.state
    checked = outcome.eager is not None
    return {
        "model": outcome.source.name,
        "rules": outcome.rules,
        "devices": {name: str(state.devices[name]) for name in state.devices},
        "simulated": outcome.simulated,
        "prompt": outcome.prompt,
        "text": outcome.text,
        "tokens": outcome.compiled.ids,
        "eager": {
            "checked": checked,
            "equal": outcome.first_difference is None if checked else None,
            "compared": len(outcome.eager.ids) if outcome.eager else 0,
            "first_difference": outcome.first_difference,
            "speed": outcome.eager.to_json() if outcome.eager else None,
        },
        "speed": outcome.compiled.to_json(),
        "compile_seconds": outcome.compile_seconds,
        "placement": [row.to_json() for row in outcome.rows],
        "graphs": report_lines(state),
        "weights": state.store.bytes_by_device(),
        "duplicates": [
            {"name": name, "copies": [{"device": e.device, "format": e.format, "bytes": e.nbytes} for e in entries]}
            for name, entries in state.store.duplicates()
        ],
        "kept_originals": state.store.kept_originals(),
        "pack_cache": state.store.pack_cache.report() if state.store.pack_cache else None,
    }


def _print(outcome: Outcome) -> None:
    console = common.stdout()
    state = outcome.state
    names = state.resolution.device_names()
    console.print(placement_table(outcome.rows, names, console.width, "Placement"))
    console.print()
    console.print(_graph_table(state))
    console.print()
    console.print(_transfer_table(state))
    console.print()
    console.print(_speed_table(outcome))
    weights = ", ".join(f"{device} {human_bytes(n)}" for device, n in state.store.bytes_by_device().items())
    console.print(Text.assemble("\n", ("weights  ", "dim"), weights), soft_wrap=True)
    doubled = state.store.duplicates()
    if doubled:
        extra = sum(sum(e.nbytes for e in entries) - max(e.nbytes for e in entries) for _, entries in doubled)
        note = f"{len(doubled)} weights, {human_bytes(extra)} more than one copy of each"
        console.print(Text.assemble(("kept twice  ", "yellow"), note), soft_wrap=True)
    kept = state.store.kept_originals()
    if kept:
        note = f"{len(kept)} weights, {human_bytes(sum(kept.values()))}, beside their packed copies (see release_host)"
        console.print(Text.assemble(("originals  ", "yellow"), note), soft_wrap=True)
    if outcome.simulated:
        note = f"{', '.join(outcome.simulated)} played by another device; every transfer is a real copy"
        console.print(Text.assemble(("simulated  ", "dim"), note), soft_wrap=True)
    console.print(_verdict(outcome), soft_wrap=True)


def _graph_table(state: ModelState) -> Table:
    table = _table("Partitions")
    table.add_column("graph")
    table.add_column("runs on one device, in order", overflow="fold")
    table.add_column("units", justify="right")
    table.add_column("compiled", justify="right")
    table.add_column("transfers", justify="right")
    table.add_column("a step", justify="right", no_wrap=True)
    colours = device_colours(state.resolution.device_names())
    for graph in state.graphs:
        transfers = graph.transfers()
        table.add_row(
            graph.phase,
            Text(" → ").join(Text(name, colours.get(name, "")) for name in graph.runs),
            str(len(graph.built.units)),
            str(len(graph.built.distinct)),
            str(len(transfers)),
            human_bytes(sum(int(n) for _, _, n in transfers)),
        )
    return table


def _transfer_table(state: ModelState) -> Table:
    """Copies and bytes a step for each pair of devices, a column a graph."""
    table = _table("Transfers")
    table.add_column("from → to")
    ways: dict[tuple[str, str], None] = {}
    counts: list[tuple[Counter[tuple[str, str]], Counter[tuple[str, str]]]] = []
    for graph in state.graphs:
        table.add_column(f"{graph.phase}, a step", justify="right")
        copies: Counter[tuple[str, str]] = Counter()
        nbytes: Counter[tuple[str, str]] = Counter()
        for source, target, size in graph.transfers():
            ways[source, target] = None
            copies[source, target] += 1
            nbytes[source, target] += int(size)
        counts.append((copies, nbytes))
    for way in ways:
        cells = [f"{c[way]} × {human_bytes(n[way] / c[way])}" if c[way] else "–" for c, n in counts]
        table.add_row(" → ".join(way), *cells)
    if not ways:
        table.add_row("none", *("–" for _ in counts))
    return table


def _speed_table(outcome: Outcome) -> Table:
    table = _table("Speed")
    table.add_column("")
    for name in ("compile", "prefill", "decode"):
        table.add_column(name, justify="right")
    kinds = [("ktfx", outcome.compiled, f"{outcome.compile_seconds:.1f} s")]
    if outcome.eager is not None:
        kinds.append(("eager", outcome.eager, "–"))
    for name, generated, compiling in kinds:
        rate = generated.decode_rate
        table.add_row(
            name,
            compiling,
            f"{generated.prefill_rate:.1f} tokens/s",
            f"{rate:.1f} tokens/s" if rate is not None else "–",
        )
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=None, header_style="dim", pad_edge=False)


def _verdict(outcome: Outcome) -> Text:
    if outcome.eager is None:
        return Text("not compared with eager (--no-check)", "yellow")
    at = outcome.first_difference
    if at is None:
        return Text.assemble(("✓ ", "green"), f"all {len(outcome.eager.ids)} generated tokens equal eager's")
    equal = f"{at} of {len(outcome.eager.ids)} tokens equal eager's, then token {at + 1} differs"
    return Text.assemble(("✗ ", "red"), equal, "; --verify names the pass that changed something, if one did")
