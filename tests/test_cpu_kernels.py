"""The native CPU kernels: every format on every instruction set that this machine runs (and the emulated AMX path),
awkward shapes, errors, threads, fork, tickets, the host function and the polling thread."""

import ctypes
import gc
import os
import threading
import time
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ktfx.cpu_kernels import library
from ktfx.errors import HostCallError, KtfxError, WeightError
from ktfx.formats import dequantize, quantize
from ktfx.ops import experts_native as native
from ktfx.ops.experts import ExpertsSpec, plain_layout, reference_experts
from ktfx.ops.experts_cpu import activations_used, cpu_kernels_status

if library.load().library is None:
    pytest.skip(f"no native kernels: {library.load().reason}", allow_module_level=True)

FORMATS = ["model", "fp8", "int8", "int4", "int4-g32", "int4-g128", "int4zp", "int4zp-g128", "mxfp4"]
FOUR_BITS = [f for f in FORMATS if "4" in f]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# What rounding x to the output's dtype, and h to bfloat16 on AMX, leaves.
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 6e-3, torch.float16: 6e-4}
# E, H, I, T, K: nothing a multiple of anything, 1 token, 1 expert, 513 tokens, experts that get more than one chunk.
SHAPES = [(5, 33, 17, 1, 2), (1, 40, 130, 33, 1), (3, 64, 48, 7, 3), (4, 190, 70, 70, 2), (2, 48, 40, 513, 2)]


@pytest.fixture(autouse=True)
def restore_isa_and_threads():
    isa, threads = native.isas()[0], native.lib().ktfx_threads()
    yield
    native.set_isa(isa)
    if native.lib().ktfx_threads() != threads or native.lib().ktfx_shares() != 1:
        native.set_threads(threads, 1)


def model_tensors(spec, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    E, H, inter = spec.num_experts, spec.hidden, spec.intermediate
    rows = inter if spec.gate == "none" else 2 * inter
    shapes = {"gate_up": (E, rows, H), "down": (E, H, inter)}
    if spec.transposed:
        shapes = {name: (s[0], s[2], s[1]) for name, s in shapes.items()}
    if spec.has_bias:
        shapes |= {"gate_up_bias": (E, rows), "down_bias": (E, H)}
    return {name: (torch.randn(s, generator=g) * 0.2).to(dtype) for name, s in shapes.items()}


def inputs(spec, dtype, T, K, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(T, spec.hidden, generator=g).to(dtype)
    ids = torch.rand(T, spec.num_experts, generator=g).argsort(dim=1)[:, :K].contiguous()
    return x, ids, torch.rand(T, K, generator=g)


def relative_error(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))


def check(spec, dtype, T, K, tolerance=None):
    """The call against the reference in float32 over the dequantised weights; returns the relative error."""
    packed = native.pack(spec, model_tensors(spec, dtype))
    x, ids, weights = inputs(spec, dtype, T, K)
    got = native.forward(spec, x, ids, weights, packed)
    want = reference_experts(spec.canonical(), x.float(), ids, weights, native.dequantised(spec, packed))
    error = relative_error(got, want)
    assert got.dtype == dtype and error < (tolerance or TOLERANCE[dtype]), f"relative error {error:.1e}"
    return error


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("weights", FORMATS)
def test_every_format_on_every_isa_equals_the_dequantised_reference(isa, weights):
    native.set_isa(isa)
    for E, H, inter, T, K in SHAPES:
        for dtype in DTYPES:
            check(ExpertsSpec(E, H, inter, weights=weights), dtype, T, K)


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("weights", ["model", "fp8", "int8", "int4"])
@pytest.mark.parametrize("tokens", [6, 16, 40])
def test_rows_of_several_blocks_over_several_blocks_of_inputs(isa, weights, tokens):
    native.set_isa(isa)
    for dtype in (torch.float32, torch.bfloat16):
        check(ExpertsSpec(2, 1100, 560, weights=weights), dtype, tokens, 1)


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("weights", FOUR_BITS)
def test_int8_activations_add_less_than_one_percent(isa, weights):
    native.set_isa(isa)
    spec = ExpertsSpec(4, 512, 384, weights=weights, activations="int8")
    assert activations_used(spec) == "int8 per 32"
    assert check(spec, torch.float32, 40, 2, tolerance=1e-2) > 1e-3, "int8 was not used"


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("transposed,interleaved", [(False, False), (True, False), (False, True), (True, True)])
def test_packing_is_that_of_formats_bit_for_bit(weights, transposed, interleaved):
    spec = ExpertsSpec(3, 70, 50, transposed=transposed, interleaved=interleaved, weights=weights)
    for dtype in DTYPES:
        tensors = model_tensors(spec, dtype)
        plain = plain_layout(spec, tensors)
        for isa in native.isas():
            native.set_isa(isa)
            got = native.dequantised(spec, native.pack(spec, tensors))
            for name in ("gate_up", "down"):
                assert torch.equal(got[name], dequantize(quantize(plain[name], weights)))


def awkward(shape, dtype, seed):
    """Rows of every size, groups of zeros, ties between codes of every format, and values just below powers of two."""
    g = torch.Generator().manual_seed(seed)
    lead, K = shape[:-1], shape[-1]
    w = torch.randn(shape, generator=g)
    span = (-24, 14) if dtype == torch.float16 else (-140, 110)
    kind = torch.randint(0, 5, (*lead, 1), generator=g)
    powers = 2.0 ** torch.randint(*span, (*lead, 1), generator=g).float()
    halves = torch.randint(-30, 30, shape, generator=g) * 0.5
    top = torch.tensor([127.0, 7.0, 448.0, 6.0, 15.0])[torch.randint(0, 5, (*lead, 1), generator=g)]
    ties = halves.clamp(-1, 1) * top + halves * (halves.abs() < top)
    below = (
        torch.where(w > 0, 1.0, -1.0)
        * (1 - torch.finfo(dtype).eps / 2)
        * 2.0 ** torch.randint(-3, 3, (*lead, 1), generator=g)
    )
    w = torch.where(kind == 0, w * powers, torch.where(kind == 1, ties, torch.where(kind == 2, below, w)))
    w[..., : K // 3] *= torch.randint(0, 2, (*lead, 1), generator=g)
    return torch.where(w == 0, torch.where(halves > 0, 0.0, -0.0), w).to(dtype)


@pytest.mark.parametrize("weights", FORMATS)
def test_packing_of_awkward_values_is_that_of_formats_bit_for_bit(weights):
    # 200 rows of gate: blocks of 128 begin in gate and end in up, and the last tile has eight rows.
    spec = ExpertsSpec(2, 150, 200, weights=weights)
    for seed, dtype in enumerate(DTYPES):
        tensors = {name: awkward(t.shape, dtype, seed) for name, t in model_tensors(spec, dtype).items()}
        for isa in native.isas():
            native.set_isa(isa)
            got = native.dequantised(spec, native.pack(spec, tensors))
            for name in ("gate_up", "down"):
                want = dequantize(quantize(tensors[name], weights))
                assert torch.equal(got[name], want), f"{isa} {dtype} {name}"


@pytest.mark.parametrize("weights", FORMATS[1:])
@pytest.mark.parametrize("where", [(0, 0, 0), (1, 399, 149), (1, 210, 64)])
def test_packing_finds_every_value_that_is_not_finite(weights, where):
    spec = ExpertsSpec(2, 150, 200, weights=weights)
    for dtype in DTYPES:
        for value in (float("nan"), float("inf"), -float("inf")):
            tensors = model_tensors(spec, dtype)
            tensors["gate_up"][where] = value
            for isa in native.isas():
                native.set_isa(isa)
                with pytest.raises(WeightError, match=f"expert {where[0]} holds NaN or inf"):
                    native.pack(spec, tensors)


@pytest.mark.parametrize("weights", FORMATS[1:])
def test_weights_that_are_quantised_already_are_taken_as_they_are(weights):
    spec = ExpertsSpec(3, 160, 50, weights=weights)
    plain = model_tensors(spec, torch.bfloat16)
    quantised = {name: quantize(t, weights) for name, t in plain.items()}
    got = native.dequantised(spec, native.pack(spec, quantised))
    for name, q in quantised.items():
        assert torch.equal(got[name], dequantize(q))


def test_packed_meta_says_what_pack_makes():
    for weights in FORMATS:
        spec = ExpertsSpec(2, 40, 24, has_bias=True, weights=weights)
        packed = native.pack(spec, model_tensors(spec, torch.float16))
        assert [(tuple(p.shape), p.dtype) for p in packed] == [
            (m.shape, m.dtype) for m in native.packed_meta(spec, torch.float16)
        ]


@pytest.mark.parametrize("gate", ["mul", "none"])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "relu2", "none"])
def test_activations_with_biases(gate, activation):
    for isa in native.isas():
        native.set_isa(isa)
        check(ExpertsSpec(3, 40, 24, activation, gate, has_bias=True), torch.float32, 9, 2, tolerance=2e-6)


def test_clamped_gate_as_in_gpt_oss():
    spec = ExpertsSpec(3, 64, 40, gate="clamped", limit=0.7, has_bias=True, transposed=True, interleaved=True)
    for weights in ("model", "mxfp4"):
        check(ExpertsSpec(**{**spec.__dict__, "weights": weights}), torch.float32, 12, 2)


def test_extreme_inputs():
    spec = ExpertsSpec(2, 32, 32)
    packed = native.pack(spec, model_tensors(spec, torch.float32))
    x, ids, weights = inputs(spec, torch.float32, 4, 1)
    x[0], x[1], x[2, 3], x[3] = 0.0, x[1] * 1e-20, float("nan"), x[3] * 1e4
    want = reference_experts(spec, x, ids, weights, native.dequantised(spec, packed))
    for isa in native.isas():
        native.set_isa(isa)
        for form in ("model", "fp8", "int8", "int4"):
            other = ExpertsSpec(2, 32, 32, weights=form)
            got = native.forward(other, x, ids, weights, native.pack(other, model_tensors(spec, torch.float32)))
            assert (got[0] == 0).all() and got[2].isnan().all() and got[[1, 3]].isfinite().all()
            if form == "model":
                assert relative_error(got[3], want[3]) < 1e-5


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_call_equals_the_reference(data):
    draw = data.draw
    dtype = draw(st.sampled_from(DTYPES))
    E = draw(st.integers(1, 6))
    spec = ExpertsSpec(
        E,
        draw(st.integers(1, 150)),
        draw(st.integers(1, 150)),
        activation=draw(st.sampled_from(["silu", "gelu_tanh", "relu2"])),
        gate=draw(st.sampled_from(["mul", "none", "clamped"])),
        transposed=draw(st.booleans()),
        interleaved=draw(st.booleans()),
        has_bias=draw(st.booleans()),
        weights=draw(st.sampled_from(FORMATS)),
    )
    native.set_isa(draw(st.sampled_from(native.isas())))
    T, K = draw(st.integers(0, 120)), draw(st.integers(1, 4))
    tensors = model_tensors(spec, dtype, seed=draw(st.integers(0, 99)))
    packed = native.pack(spec, tensors)
    x = torch.randn(T, spec.hidden).to(dtype)
    ids = torch.randint(0, draw(st.integers(1, E)), (T, K), dtype=draw(st.sampled_from([torch.int32, torch.int64])))
    weights = torch.rand(T, K).to(draw(st.sampled_from(DTYPES)))
    got = native.forward(spec, x, ids, weights, packed)
    want = reference_experts(spec.canonical(), x.float(), ids, weights, native.dequantised(spec, packed))
    scale = want.double().norm().clamp_min(1e-3)
    assert (got.double() - want.double()).norm() <= 3 * TOLERANCE[dtype] * scale


@pytest.mark.parametrize("bad", [-1, 4, 2**40])
def test_an_id_out_of_range_is_an_error_and_the_next_call_works(bad):
    spec = ExpertsSpec(4, 32, 16)
    packed = native.pack(spec, model_tensors(spec, torch.float32))
    x, ids, weights = inputs(spec, torch.float32, 3, 2)
    good = native.forward(spec, x, ids, weights, packed)
    wrong = ids.clone()
    wrong[1, 1] = bad
    with pytest.raises(HostCallError, match=f"expert id {bad} of token 1"):
        native.forward(spec, x, wrong, weights, packed)
    with pytest.raises(HostCallError, match=f"expert id {bad} of token 1"):
        native.submit(spec, x, wrong, weights, packed).wait()
    assert torch.equal(native.forward(spec, x, ids, weights, packed), good)


def test_wrong_inputs_are_named():
    spec = ExpertsSpec(4, 32, 16)
    packed = native.pack(spec, model_tensors(spec, torch.float32))
    x, ids, weights = inputs(spec, torch.float32, 3, 2)
    with pytest.raises(HostCallError, match="shapes"):
        native.forward(spec, x[:, :30], ids, weights, packed)
    with pytest.raises(HostCallError, match="dtypes"):
        native.forward(spec, x.double(), ids, weights, packed)
    with pytest.raises(WeightError, match="pack the layer again"):
        native.forward(ExpertsSpec(4, 48, 16), torch.randn(3, 48), ids, weights, packed)
    with pytest.raises(WeightError, match="NaN"):
        native.pack(ExpertsSpec(1, 32, 16, weights="int4"), {"gate_up": torch.full((1, 32, 32), torch.nan), "down": x})
    with pytest.raises(KtfxError, match="avx1024"):
        native.set_isa("avx1024")


def test_results_do_not_depend_on_threads_or_shares():
    for weights in ("model", "int8", "int4"):
        spec = ExpertsSpec(6, 200, 136, weights=weights)
        packed = native.pack(spec, model_tensors(spec, torch.bfloat16))
        for T in (1, 5, 60):
            x, ids, w = inputs(spec, torch.bfloat16, T, 3)
            results = []
            # Two and three shares are NUMA nodes in play: the same split of every expert, on one node.
            for threads, shares in ((1, 1), (2, 1), (16, 1), (4, 2), (5, 3)):
                native.set_threads(threads, shares)
                assert (native.lib().ktfx_threads(), native.lib().ktfx_shares()) == (threads, shares)
                results += [native.forward(spec, x, ids, w, packed) for _ in range(3)]
            assert all(torch.equal(r, results[0]) for r in results)


def test_waking_threads_is_only_a_hint():
    spec = ExpertsSpec(4, 64, 48)
    packed = native.pack(spec, model_tensors(spec, torch.float32))
    call = inputs(spec, torch.float32, 5, 2)
    native.set_threads(4, 2)
    want = native.forward(spec, *call, packed)
    stop = threading.Event()

    def wake():
        while not stop.is_set():
            native.lib().ktfx_wake()
            time.sleep(0.0003)  # so that some calls find threads asleep

    waker = threading.Thread(target=wake)
    waker.start()
    try:
        for i in range(60):
            assert torch.equal(native.forward(spec, *call, packed), want)
            time.sleep(0.001 * (i % 3))
    finally:
        stop.set()
        waker.join()


def test_the_callers_float_mode_is_left_alone():
    spec = ExpertsSpec(2, 32, 16, weights="fp8")
    packed = native.pack(spec, model_tensors(spec, torch.float32))
    x, ids, weights = inputs(spec, torch.float32, 3, 2)
    want = native.forward(spec, x, ids, weights, packed)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush subnormals")
    try:
        assert torch.equal(native.forward(spec, x, ids, weights, packed), want)
        assert (torch.tensor([1e-40]) * 1.0).item() == 0.0
    finally:
        torch.set_flush_denormal(False)


def test_several_python_threads_and_models():
    specs = [ExpertsSpec(4, 64 + 16 * i, 48, weights=f) for i, f in enumerate(("model", "int4", "int8"))]
    layers = [
        (s, native.pack(s, model_tensors(s, torch.float32)), inputs(s, torch.float32, 5 + i, 2))
        for i, s in enumerate(specs)
    ]
    wants = [native.forward(s, *i, p) for s, p, i in layers]
    wrong = []

    def run(which):
        spec, packed, args = layers[which]
        for _ in range(30):
            if not torch.equal(native.forward(spec, *args, packed), wants[which]):
                wrong.append(which)

    threads = [threading.Thread(target=run, args=(i % 3,)) for i in range(6)]
    for t in threads:
        t.start()
    native.set_threads(3, 1)  # while calls run
    for t in threads:
        t.join()
    assert not wrong


def test_a_forked_child_computes_too():
    spec = ExpertsSpec(3, 64, 32, weights="int4")
    packed = native.pack(spec, model_tensors(spec, torch.float32))
    args = inputs(spec, torch.float32, 6, 2)
    want = native.forward(spec, *args, packed)
    assert torch.equal(native.submit(spec, *args, packed).wait(), want)
    pid = os.fork()
    if pid == 0:
        ok = torch.equal(native.forward(spec, *args, packed), want)
        ok = ok and torch.equal(native.submit(spec, *args, packed).wait(), want)
        os._exit(0 if ok else 1)
    deadline = time.monotonic() + 60
    while (done := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    if done[0] == 0:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    assert done[0] == pid and os.waitstatus_to_exitcode(done[1]) == 0, "the child hung or computed something else"


def test_tickets():
    spec = ExpertsSpec(4, 64, 48)
    packed = native.pack(spec, model_tensors(spec, torch.bfloat16))
    calls = [inputs(spec, torch.bfloat16, T, 2, seed=T) for T in (1, 40, 3)]
    tickets = [native.submit(spec, *c, packed) for c in calls]
    for ticket, c in reversed(list(zip(tickets, calls, strict=True))):
        assert torch.equal(ticket.wait(), native.forward(spec, *c, packed))
    with pytest.raises(HostCallError, match="waited for before"):
        tickets[0].wait()


def host_call(spec, packed, args):
    call = native.native_call(native.native_layer(spec, packed), *args, torch.empty_like(args[0]))
    return call, native.forward(spec, *args, packed)


def test_the_host_function_takes_a_pointer():
    spec = ExpertsSpec(4, 64, 48, weights="int8")
    packed = native.pack(spec, model_tensors(spec, torch.float32))
    call, want = host_call(spec, packed, inputs(spec, torch.float32, 4, 2))
    native.lib().ktfx_host_call(call.pointer)
    assert call.struct.status == 0 and torch.equal(call.tensors[3], want)
    call.tensors[1][2, 0] = 99
    native.lib().ktfx_host_call(call.pointer)
    assert call.struct.status == 1 and b"expert id 99 of token 2" in call.struct.message


def flags(count):
    memory = torch.zeros(count * 2, dtype=torch.int32)
    at = [ctypes.c_uint32.from_address(memory.data_ptr() + 4 * i) for i in range(count * 2)]
    return memory, at[:count], at[count:]


def raised(flag, seconds=30.0):
    end = time.monotonic() + seconds
    while flag.value == 0 and time.monotonic() < end:
        time.sleep(0.001)
    return flag.value


def test_the_poller_runs_calls_and_every_way_out_sets_the_flag():
    spec = ExpertsSpec(4, 64, 48)
    packed = native.pack(spec, model_tensors(spec, torch.float32))
    good, want = host_call(spec, packed, inputs(spec, torch.float32, 2, 2))
    bad, _ = host_call(spec, packed, inputs(spec, torch.float32, 2, 2))
    bad.tensors[1][0, 0] = -7
    memory, start, done = flags(2)
    lib = native.lib()
    poller = lib.ktfx_poller_create()
    assert poller
    for i, call in enumerate((good, bad)):
        assert (
            lib.ktfx_poller_add(poller, ctypes.byref(call.struct), ctypes.byref(start[i]), ctypes.byref(done[i])) == 0
        )
    for armed in (1, 0):  # asleep it still answers, only later
        lib.ktfx_poller_arm(poller, armed)
        for _ in range(20):
            good.tensors[3].zero_()
            start[0].value = 1
            assert raised(done[0]) == 1 and start[0].value == 0 and torch.equal(good.tensors[3], want)
            done[0].value = 0
        start[1].value = 1
        assert raised(done[1]) == 2 and b"expert id -7" in bad.struct.message
        done[1].value = 0
    start[0].value = 1
    lib.ktfx_poller_destroy(poller)
    assert done[0].value in (1, 2), "a stream waiting for this flag would hang"
    del memory


def test_status_names_the_isa():
    status = cpu_kernels_status()
    assert status.path == "native" and status.isa in native.isas() and status.isa in str(status)
    assert status.threads == native.lib().ktfx_threads()


@pytest.mark.parametrize("weights", ["int8", "int4", "mxfp4"])
@pytest.mark.parametrize("rows", [5, 6, 7, 17, 49])
def test_few_rows_an_expert_over_many_inputs(weights, rows):
    """Row blocks that read the tile itself, and a panel, which holds 512 inputs at a time, by format and rows."""
    g = torch.Generator().manual_seed(rows)
    spec = ExpertsSpec(num_experts=2, hidden=1152, intermediate=640, weights=weights)
    tensors = {
        "gate_up": torch.randn(2, 1280, 1152, generator=g) * 0.05,
        "down": torch.randn(2, 1152, 640, generator=g) * 0.05,
    }
    packed = native.pack(spec, tensors)
    x = torch.randn(rows, 1152, generator=g)
    ids = torch.zeros(rows, 1, dtype=torch.int64)
    routing = torch.rand(rows, 1, generator=g)
    got = native.forward(spec, x, ids, routing, packed)
    want = reference_experts(spec, x, ids, routing, native.dequantised(spec, packed))
    assert (got - want).norm() / want.norm() < 6e-3


def test_the_profile_accounts_for_calls_while_it_is_on():
    spec = ExpertsSpec(4, 64, 48, weights="int8")
    packed = native.pack(spec, {"gate_up": torch.randn(4, 96, 64), "down": torch.randn(4, 64, 48)})
    x, ids, weights = torch.randn(40, 64), torch.randint(0, 4, (40, 2)), torch.rand(40, 2)
    sums = (ctypes.c_double * library.PROFILE_SUMS)()
    native.lib().ktfx_profile(1, None)
    want = native.forward(spec, x, ids, weights, packed)
    native.lib().ktfx_profile(0, sums)
    assert sums[0] == 1 and min(sums[2], sums[6], sums[10]) > 0
    assert torch.equal(native.forward(spec, x, ids, weights, packed), want)
    native.lib().ktfx_profile(0, sums)
    assert list(sums) == [0.0] * library.PROFILE_SUMS


@pytest.mark.parametrize("weights", ["model", "int8", "int4", "mxfp4"])
def test_how_far_ahead_weights_are_fetched_changes_nothing(weights):
    spec = ExpertsSpec(4, 256, 96, weights=weights)
    packed = native.pack(spec, {"gate_up": torch.randn(4, 192, 256), "down": torch.randn(4, 256, 96)})
    x, ids, routing = torch.randn(3, 256), torch.randint(0, 4, (3, 2)), torch.rand(3, 2)
    want = native.forward(spec, x, ids, routing, packed)
    try:
        for distance in (64, 1 << 14, 1 << 20):
            native.lib().ktfx_set_ahead(distance)
            assert torch.equal(native.forward(spec, x, ids, routing, packed), want)
    finally:
        native.lib().ktfx_set_ahead(0)
    assert native.lib().ktfx_ahead() == 0


@pytest.mark.parametrize("weights", ["model", "fp8", "int8", "int4", "int4zp", "mxfp4"])
def test_amx_may_take_an_expert_from_any_number_of_rows(weights):
    """Which default suits a format is a matter of speed; bf16's h tells that AMX ran."""
    native.set_isa("amx-emulated")
    spec, setting = ExpertsSpec(3, 190, 70, weights=weights), native.lib().ktfx_set_amx_rows
    packed = native.pack(spec, model_tensors(spec, torch.bfloat16))
    results = {}
    for tokens in (1, 5, 20):
        x, ids, routing = inputs(spec, torch.bfloat16, tokens, 2)
        want = reference_experts(spec.canonical(), x.float(), ids, routing, native.dequantised(spec, packed))
        try:
            for rows in (1, 4, 1000):
                setting(rows)
                got = results[tokens, rows] = native.forward(spec, x, ids, routing, packed)
                assert relative_error(got, want) < TOLERANCE[torch.bfloat16]
        finally:
            setting(0)
    assert native.lib().ktfx_amx_rows() == 0
    assert not torch.equal(results[20, 1], results[20, 1000]), "AMX was not used"


@pytest.mark.parametrize("isa", [isa for isa in native.isas() if isa.startswith("amx")])
@pytest.mark.parametrize("hidden,inter", [(64, 64), (192, 128), (4160, 64), (128, 1088)])
def test_amx_multiplies_int8_weights_as_they_are_stored(isa, hidden, inter):
    """In whole steps of 64 inputs, x as halves of int16: rows of any size, more than a piece, chunks and their ends."""
    native.set_isa(isa)
    spec = ExpertsSpec(3, hidden, inter, weights="int8", has_bias=True)
    packed = native.pack(spec, model_tensors(spec, torch.bfloat16))
    for tokens in (9, 40, 230):
        x, ids, routing = inputs(spec, torch.bfloat16, tokens, 2)
        x[1], x[2], x[3] = 0, x[2] * 1e15, x[3] * 1e-20
        want = reference_experts(spec.canonical(), x.float(), ids, routing, native.dequantised(spec, packed))
        got = native.forward(spec, x, ids, routing, packed)
        for row in range(4):  # each in its own measure: their sizes differ by thirty orders of magnitude
            assert relative_error(got[row], want[row]) < 1.5e-2
        assert relative_error(got[4:], want[4:]) < TOLERANCE[torch.bfloat16]
        for bad in (torch.nan, torch.inf):
            x[5, hidden - 1] = bad
            broken = native.forward(spec, x, ids, routing, packed)
            assert not broken[5].isfinite().any() and torch.equal(broken[6:], got[6:])


def test_packed_weights_are_freed_with_their_last_owner():
    spec = ExpertsSpec(2, 32, 32)
    packed = native.pack(spec, {"gate_up": torch.randn(2, 64, 32), "down": torch.randn(2, 32, 32)})
    native.forward(spec, torch.randn(1, 32), torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1), packed)
    gone = [weakref.ref(t) for t in packed]
    del packed
    gc.collect()
    assert all(ref() is None for ref in gone)
