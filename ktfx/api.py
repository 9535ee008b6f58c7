"""``ktfx.compile`` and its kin: a model made ready for ``generate()``, reversibly."""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ktfx.adopt import adopt, give_up
from ktfx.backend import compile_graph
from ktfx.bad_calls import bound_argument, reason_for_failure, refuse_bad_shapes
from ktfx.cache import place_cache
from ktfx.cache_argument import cache_given
from ktfx.copies import leave_out_of_copies, stop_leaving_out
from ktfx.debug.watch import repro_directory
from ktfx.direct import MAX_FORMS, DirectCall, can_be_called_directly, form_of, note_call, notes_of
from ktfx.dynamo_access import with_own_code
from ktfx.errors import CaptureError, KtfxError, KtfxWarning, OptionError
from ktfx.generation import generate_with_callers_cache, prepare_with_long_layers
from ktfx.graph_breaks import first_line, refuse_break_inside_layer
from ktfx.options import CompileOptions, RulesSource, parse_options
from ktfx.sliding_cache import lengthen_sliding_layers
from ktfx.state import ModelState, forget, model_state, states_of
from ktfx.watch import ModuleWatch, watch_modules

_ATTRIBUTE = "_ktfx_compiled"
PREPARE = "prepare_inputs_for_generation"
RECOMPILE_LIMIT = 64
CALLS_THAT_MAY_COUNT = 3


@dataclass
class Compiled:
    """What ``ktfx.compile`` changed on a model, so that ``ktfx.restore`` can change it back."""

    options: CompileOptions
    state: ModelState
    forward: Callable[..., Any]
    watch: ModuleWatch
    cache_implementation: Any = None
    disable_compile: Any = None
    set_generation: bool = False
    wraps_generate: bool = False
    wraps_prepare: bool = False

    def attributes(self) -> tuple[str, ...]:
        """Names of the model's instance attributes that are ktfx's."""
        wrapped = {"forward": True, "generate": self.wraps_generate, PREPARE: self.wraps_prepare}
        return tuple(name for name, mine in wrapped.items() if mine)

    def generation_settings(self) -> dict[str, Any]:
        """The model's own generation settings, of those that ktfx changed."""
        names = ("cache_implementation", "disable_compile") if self.set_generation else ()
        return {name: getattr(self, name) for name in names}


def compile(
    model: nn.Module,
    rules: RulesSource = None,
    *,
    cache: str | None = "static",
    release_host: bool | str = False,
    dynamic: bool | None = None,
    direct_calls: bool = True,
    **options: Any,
) -> nn.Module:
    """Return ``model`` with its forward compiled by the rules; ``generate()`` then compiles prefill and decode.

    rules: a path, a shipped name, or rules as Python objects; None picks the shipped file for the model and machine.
    cache: the cache that plain ``generate()`` makes: ``static`` (placed with its layers) or None (leave it).
    release_host: True: weights that moved to another device leave the logical one, and experts that a kernel packed
        exist only packed; ``state_dict()`` still returns them bit for bit, and what could not is refused.
        ``exact``: such weights stay beside their packed copies. ``lossy``: ``state_dict()`` returns packed numbers.
    direct_calls: repeat calls of one form run the program without Dynamo's guards (see ``ktfx.direct``); parameters,
        cache, grad mode and the config's output settings are still checked.
    options: see ``CompileOptions`` (simulate, verify, partition_backend, query_input, memory, …).

    The model's inputs and outputs stay on its own device. ``ktfx.restore(model)`` undoes everything.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"ktfx.compile takes an nn.Module, not a {type(model).__name__}")
    if hasattr(model, _ATTRIBUTE):
        restore(model)
    if cache not in ("static", None):
        raise OptionError(f"cache={cache!r}", expected="'static' or None (whatever the caller passes)")
    if release_host not in (False, True, "exact", "lossy"):
        raise OptionError(f"release_host={release_host!r}", expected="False, True, 'exact' or 'lossy'")
    parsed = parse_options({"rules": rules, **options})
    if model.training:
        raise CaptureError(
            "the model is in training mode; ktfx compiles inference only", mend="call model.eval() first"
        )
    state = model_state(model, parsed, _device_of(model))
    original = with_own_code(model.forward)
    own_forward = model.__dict__.get("forward")
    compiled = Compiled(parsed, state, model.forward, watch_modules(model))
    # torch ≥ 2.11 has the filter; placed parameters cost 5 ms of guards a call without it, and plain ones 0.3 ms.
    # Whole graphs first: Dynamo then says where a break is instead of cutting the model in silence.
    backend = _Backend(weakref.ref(model), parsed)
    whole = torch.compile(
        original,
        backend=backend,
        dynamic=dynamic,
        fullgraph=True,
        options={"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe},
    )
    # Pieces need their guards: they tell the layers apart.
    pieces = torch.compile(original, backend=backend, dynamic=dynamic)
    checked = parsed.verify or parsed.keep_graphs or repro_directory(parsed) is not None
    direct = direct_calls and not checked and can_be_called_directly(model)
    model.forward = _wrap(model, original, whole, pieces, compiled, direct)
    generation = getattr(model, "generation_config", None)
    if generation is not None and cache is not None:
        compiled.cache_implementation = generation.cache_implementation
        compiled.disable_compile = generation.disable_compile
        compiled.set_generation = True
        if generation.cache_implementation is None:
            generation.cache_implementation = cache
        generation.disable_compile = True  # generate() would compile the compiled forward again
        if "generate" not in model.__dict__ and hasattr(type(model), "generate"):
            model.__dict__["generate"] = generate_with_callers_cache(model, compiled.cache_implementation)
            compiled.wraps_generate = True
    if parsed.sliding_cache == "full" and PREPARE not in model.__dict__ and hasattr(type(model), PREPARE):
        model.__dict__[PREPARE] = prepare_with_long_layers(model)
        compiled.wraps_prepare = True
    adopt(model)
    object.__setattr__(model, _ATTRIBUTE, compiled)
    own = {} if own_forward is None else {"forward": own_forward}
    leave_out_of_copies(model, (_ATTRIBUTE, *compiled.attributes()), own, compiled.generation_settings())
    if release_host:
        from ktfx.release import release_host_copies

        try:
            release_host_copies(model, state, release_host)
        except BaseException:
            restore(model)
            raise
    return model


class _Backend:
    """A callable that torch.compile takes as a backend; it knows its model without looking at the frame."""

    def __init__(self, model: weakref.ref[nn.Module], options: CompileOptions) -> None:
        self.model = model
        self.options = options
        self.__name__ = "ktfx"

    def __call__(self, gm: Any, example_inputs: Any, **_: Any) -> Callable[..., Any]:
        return compile_graph(gm, example_inputs, self.options, model=self.model())


def _wrap(
    model: nn.Module,
    original: Callable[..., Any],
    whole: Callable[..., Any],
    pieces: Callable[..., Any],
    record: Compiled,
    direct_calls: bool,
) -> Callable[..., Any]:
    """The forward that callers see: places the cache, runs the compiled graph, turns torch's errors into ktfx's.

    Threads take turns: a program has one set of buffers, and a call may have to compile.
    """
    state, watch = record.state, record.watch
    logical = _device_of(model)
    turn = threading.RLock()
    self_ref = weakref.ref(model)
    in_pieces = False
    shapes: dict[Any, Any] = {}
    # A form of call → how to run its program directly, or None where that cannot be.
    known_calls: dict[Any, DirectCall | None] = {}
    counting: dict[Any, int] = {}
    dynamo = torch._dynamo.config

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with turn:
            try:
                return answer(args, kwargs)
            except KtfxError:
                raise
            except Exception as error:
                reason = reason_for_failure(model_of(), original, args, kwargs)
                if reason is None:
                    raise
                raise reason from error

    def answer(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        watch.refuse_replaced()
        if model_of().training:
            raise CaptureError("the model was put in training mode after it was compiled", mend="call model.eval()")
        form = (form_of(args, kwargs), _settings(model_of())) if direct_calls and not in_pieces else None
        if form is None or form[0] is None:
            return compiled(args, kwargs)
        known = known_calls.get(form)
        if known is not None:
            output = known.run(kwargs)
            if output is not None:
                return output
        if form in known_calls and known is None:
            return compiled(args, kwargs)
        before = notes_of(kwargs)
        state.log.calls = []
        try:
            output = compiled(args, kwargs)
            noted = state.log.calls
        finally:
            state.log.calls = None
        if len(known_calls) >= MAX_FORMS:
            known_calls.clear()
            counting.clear()
        if notes_of(kwargs) != before:
            # A fresh cache was filled, and the next call may be plain; or a layer counts, and no call ever is.
            counting[form] = counting.get(form, 0) + 1
            if counting[form] < CALLS_THAT_MAY_COUNT:
                return output
            plain = False
        else:
            plain = len(noted) == 1 and not in_pieces
        known_calls[form] = note_call(kwargs, noted[0], output, lambda: forget_call(form)) if plain else None
        return output

    def forget_call(form: Any) -> None:
        known_calls.pop(form, None)

    def model_of() -> nn.Module:
        owner = self_ref()
        assert owner is not None
        return owner

    def compiled(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        refuse_bad_shapes(original, args, kwargs)
        cache = cache_given(kwargs)
        if cache is not None:
            if record.options.sliding_cache == "full":
                lengthen_sliding_layers(cache, bound_argument(original, "attention_mask", args, kwargs))
            place_cache(cache, model_of(), original, args, kwargs, state.resolution, state.devices, logical, shapes)
        # A float attribute (a scale) that differs between two models must not become a graph input (torch 2.11).
        # Eight graphs, torch's limit, are few for prefill, decode, batches and caches of several kinds.
        before = dynamo.specialize_float, dynamo.recompile_limit
        dynamo.specialize_float, dynamo.recompile_limit = True, max(RECOMPILE_LIMIT, before[1])
        try:
            return through_dynamo(args, kwargs)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            if isinstance(error.inner_exception, KtfxError):
                raise error.inner_exception from None
            raise
        finally:
            dynamo.specialize_float, dynamo.recompile_limit = before

    def through_dynamo(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal in_pieces
        if not in_pieces:
            try:
                return whole(*args, **kwargs)
            except (torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError) as error:
                refuse_break_inside_layer(model_of(), error)
                _warn_pieces(f"the model does not trace whole: {first_line(error)}")
            except torch._dynamo.exc.FailOnRecompileLimitHit:
                raise CaptureError(
                    f"this call needs a graph of its own, and the model has {dynamo.recompile_limit} already",
                    expected="a few graphs: prefill, decode, and one for each batch size and kind of cache",
                    mend="call the model with fewer different batch sizes and caches, pass dynamic=True, or "
                    "raise torch._dynamo.config.recompile_limit",
                ) from None
            in_pieces = True
        return pieces(*args, **kwargs)

    forward.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    return forward


def _settings(model: nn.Module) -> Any:
    """The model's settings that change what a call returns."""
    config = getattr(model, "config", None)
    names = ("use_cache", "return_dict", "output_hidden_states", "output_attentions", "_attn_implementation")
    return tuple(getattr(config, name, None) for name in names)


def _warn_pieces(reason: str) -> None:
    warnings.warn(f"{reason}. It runs in pieces: slower, but right.", KtfxWarning, stacklevel=3)


def _device_of(model: nn.Module) -> torch.device:
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def restore(model: nn.Module) -> nn.Module:
    """Undo ``ktfx.compile``: the model's own forward, generation settings and plain parameters come back."""
    compiled: Compiled | None = getattr(model, _ATTRIBUTE, None)
    if compiled is None:
        return model
    compiled.watch.end()
    stop_leaving_out(model)
    for name in compiled.attributes():
        model.__dict__.pop(name, None)
    if getattr(model.forward, "__func__", None) is not getattr(compiled.forward, "__func__", None):
        model.forward = compiled.forward  # the instance had a forward of its own
    if compiled.set_generation:
        model.generation_config.cache_implementation = compiled.cache_implementation  # type: ignore[union-attr]
        model.generation_config.disable_compile = compiled.disable_compile  # type: ignore[union-attr]
    from ktfx.release import fetch_released

    give_up(model)
    fetch_released(model)
    object.__delattr__(model, _ATTRIBUTE)
    forget(model)
    return model


def refresh(model: nn.Module) -> int:
    """Bring every placed copy up to date with the model's parameters; returns how many copies were renewed.

    Needed after writes that leave no trace (``p.data.fill_(…)``); replaced parameters and ordinary in-place writes are
    noticed by themselves.
    """
    return sum(state.store.refresh() for state in states_of(model))


def state_of(model: nn.Module) -> ModelState:
    """What ktfx knows of a compiled model: placement, weights, and the report of each graph."""
    states = states_of(model)
    if not states:
        raise KtfxError("the model was not compiled by ktfx yet", mend="call ktfx.compile(model), or run it once")
    return states[-1]
