"""Kernels go through Triton's compiler for Hopper, without a GPU, with the arguments of decode steps and of prefills.

The interpreter takes what the compiler does not: an argument that is 1 becomes a Python number there, and a tile with
another layout. What is compiled here is not run.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tensor_core_registers import overwritten, products_a_wait

from ktfx.ops import load_ops
from ktfx.ops.experts import ExpertsSpec, experts_kernel
from ktfx.ops.linear import LinearSpec, linear_kernel

triton = pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the compiler is wanted"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's own tests compile them"),
]
BF16 = torch.bfloat16


class Hopper:
    """As much of a driver as a compile asks for."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, Any]]]:
    """Launches compile and do not run; the names of the kernels and what became of them."""
    import ktfx.triton_kernels.dependent_launch as dependent_launch
    from triton.runtime.jit import JITFunction

    made: list[tuple[str, Any]] = []
    run = JITFunction.run

    def warm(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = run(self, *args, **{**kwargs, "warmup": True})
        made.append((self.__name__, kernel))
        return kernel

    monkeypatch.setattr(JITFunction, "run", warm)
    monkeypatch.setattr(dependent_launch, "_supported", lambda device: True)
    monkeypatch.setattr(triton.runtime.driver, "_active", Hopper())
    yield made


def decode_tensors(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape, dtype=BF16) for name, shape in shapes.items()}


def ropes() -> None:
    from ktfx.triton_kernels.rope import CacheRows, norm_rope, norm_rope_write, rope

    t = decode_tensors(q=(1, 32, 1, 128), k=(1, 4, 1, 128), cache=(1, 4, 1024, 128), table=(1, 1, 64), w=(128,))
    rope(t["q"], t["table"], t["table"], "half")
    norm_rope(t["q"], t["k"], t["table"], t["table"], "half", [t["w"]] * 2, 1e-6, "llama")
    cache = CacheRows(t["cache"], t["cache"].clone(), torch.tensor(3), t["k"].clone(), True)
    norm_rope_write(t["q"], t["k"], t["table"], t["table"], "half", [t["w"]] * 2, 1e-6, "llama", cache)


def caches() -> None:
    from ktfx.triton_kernels.cache_write import cache_write

    t = decode_tensors(latent=(1, 1, 64, 512), rope=(1, 1, 64, 64), c=(1, 1, 1, 512), r=(1, 1, 1, 64))
    cache_write(t["latent"], t["rope"], torch.tensor(3), t["c"], t["r"], True)


def linears() -> None:
    from ktfx.triton_kernels.linear_rows import linear_rows, linear_rows_add, norm_linear_rows

    t = decode_tensors(x=(1, 1, 2048), r=(1, 1, 2048), norm=(2048,), q=(4096, 2048), k=(512, 2048), one=(1, 1))
    norm_linear_rows(t["x"], t["r"], t["norm"], 1e-6, "llama", [t["q"], t["k"], t["k"]], [])
    linear_rows(torch.zeros(1, 4096, dtype=BF16), [torch.zeros(2048, 4096, dtype=BF16)], [], wide=True)
    linear_rows(t["x"], [t["q"], t["q"]], [], act="silu")
    norm_linear_rows(t["x"], t["r"], t["norm"], 1e-6, "gemma", [t["k"], t["k"]], [], act="gelu_tanh")
    down = torch.zeros(2048, 4096, dtype=BF16)
    for share in (None, t["one"]):
        linear_rows_add(torch.zeros(1, 4096, dtype=BF16), down, None, t["x"], share)


def attentions() -> None:
    from ktfx.triton_kernels.attention_decode import attention_decode_masked
    from ktfx.triton_kernels.mla_decode import mla_decode

    t = decode_tensors(q=(1, 32, 1, 128), cache=(1, 4, 256, 128), latent=(1, 1, 256, 512), rope=(1, 1, 256, 64))
    mask, bounds = torch.ones(1, 1, 1, 256, dtype=torch.bool), torch.tensor([[0, 5]], dtype=torch.int32)
    attention_decode_masked(t["q"], t["cache"], t["cache"], mask, bounds, 1.0, None, 0.0, torch.empty_like(t["q"]))
    q, out = torch.zeros(1, 16, 1, 512, dtype=BF16), torch.empty(1, 16, 1, 512, dtype=BF16)
    mla_decode(q, torch.zeros(1, 16, 1, 64, dtype=BF16), t["latent"], t["rope"], mask, bounds, 1.0, out)


def quantised(
    weights: str, rows: int = 1, experts: tuple[int, int, int] = (4, 128, 64), tokens: tuple[int, ...] = (1,),
    pairs: bool | None = None,
) -> None:  # fmt: skip
    """A linear layer of so many rows, and experts (E, H, I), of which each token chooses two."""
    from ktfx.triton_kernels.experts import routed_experts
    from ktfx.triton_kernels.linear import linear

    linear_spec, (E, H, inter) = LinearSpec(256, 64, weights), experts
    packed = linear_kernel("triton").pack(linear_spec, torch.ones(64, 256, dtype=BF16), torch.device("cpu"))
    linear(torch.zeros(rows, 256, dtype=BF16), packed, None, weights, 64)
    spec = ExpertsSpec(E, H, inter, weights=weights)
    gate_up, down = torch.ones(E, 2 * inter, H, dtype=BF16), torch.ones(E, H, inter, dtype=BF16)
    parts = experts_kernel("triton").pack(spec, {"gate_up": gate_up, "down": down}, torch.device("cpu"))
    for T in tokens:
        ids, share = torch.zeros(T, 2, dtype=torch.int64), torch.ones(T, 2, dtype=BF16)
        routed_experts(spec, torch.zeros(T, H, dtype=BF16), ids, share, parts, pairs=pairs)


def descriptors() -> None:
    """Plain weights in tiles of 128 inputs, as on Hopper."""
    from ktfx.triton_kernels.experts import TilesConfig, routed_experts

    spec = ExpertsSpec(2, 192, 64)
    packed = [torch.ones(2, 128, 192, dtype=BF16), torch.ones(2, 192, 64, dtype=BF16)]
    ids, share = torch.zeros(256, 2, dtype=torch.int64), torch.ones(256, 2, dtype=BF16)
    configs = TilesConfig(128, 128, 64, 8, 8, 4, tma=True), TilesConfig(128, 256, 64, 8, 8, 4, tma=True)
    routed_experts(spec, torch.zeros(256, 192, dtype=BF16), ids, share, packed, pairs=False, configs=configs)


def halves(weights: str, BM: int = 64, more: int = 16) -> None:
    """Experts and a linear layer of eight bits as they are stored, as on Hopper."""
    from ktfx.triton_kernels.experts import TilesConfig, routed_experts
    from ktfx.triton_kernels.linear import LinearConfig, linear

    spec, ones = ExpertsSpec(2, 256, 128, weights=weights), partial(torch.ones, dtype=BF16)
    cpu = torch.device("cpu")
    packed = experts_kernel("triton").pack(spec, {"gate_up": ones(2, 256, 256), "down": ones(2, 256, 128)}, cpu)
    ids, share = torch.zeros(256, 2, dtype=torch.int64), ones(256, 2)
    config = (TilesConfig(BM, 64, 128, 8, 4, 3, more, halves=True), TilesConfig(BM, 128, 128, 8, 4, 3, halves=True))
    routed_experts(spec, ones(256, 256), ids, share, packed, pairs=False, configs=config)
    parts = linear_kernel("triton").pack(LinearSpec(256, 512, weights), ones(512, 256), cpu)
    linear(ones(256, 256), parts, None, weights, 512, LinearConfig(False, 1, 64, 128, 128, 1, 8, 4, 3, True))


def halves_of_one() -> None:
    """Every size is one: Triton passes such sizes as constants."""
    from ktfx.triton_kernels.experts import TilesConfig, routed_experts
    from ktfx.triton_kernels.linear import LinearConfig, linear

    cpu, one = torch.device("cpu"), torch.zeros(1, 1, dtype=torch.int64)
    for weights in ("fp8", "int8"):
        spec = ExpertsSpec(1, 16, 16, gate="none", weights=weights)
        tensors = {"gate_up": torch.ones(1, 16, 16, dtype=BF16), "down": torch.ones(1, 16, 16, dtype=BF16)}
        packed = experts_kernel("triton").pack(spec, tensors, cpu)
        config = (TilesConfig(16, 64, 128, 1, 4, 2, 16, halves=True),) * 2
        x, share = torch.ones(1, 16, dtype=BF16), torch.ones(1, 1, dtype=BF16)
        routed_experts(spec, x, one, share, packed, pairs=False, configs=config)
        parts = linear_kernel("triton").pack(LinearSpec(16, 1, weights), torch.ones(1, 16, dtype=BF16), cpu)
        linear(x, parts, None, weights, 1, LinearConfig(False, 1, 16, 64, 128, 1, 8, 4, 2, True))


def tiles(weights: str, tokens: tuple[int, ...]) -> None:
    """So many rows an expert; a tile of 64 has another half for an expert's last rows."""
    quantised(weights, 12, (2, 192, 192), tokens, pairs=False)


TILES = {"_tiles_up_kernel", "_tiles_down_kernel", "_combine_kernel", "_place_kernel"}
FORMATS = ("model", "int4", "int4zp-g32", "int8", "mxfp4", "fp8")
CASES: dict[str, tuple[Callable[[], None], set[str]]] = {
    "ropes": (ropes, {"_norm_rope_kernel"}),
    "caches": (caches, {"_cache_write_kernel"}),
    "linears": (linears, {"_rows_kernel"}),
    "attentions": (attentions, {"_part_kernel", "_merge_kernel"}),
    **{
        w: (
            partial(quantised, w, tokens=(1, 5), pairs=True),
            {"_rows_kernel", "_pairs_up_kernel", "_pairs_down_kernel"},
        )
        for w in ("model", "int4", "int4zp", "int8", "mxfp4", "fp8")
    },
    "descriptors": (descriptors, {"_up_kernel", "_down_kernel"}),
    "halves of one": (halves_of_one, {"_halve_kernel", "_halves_kernel", "_up_kernel", "_down_kernel"}),
    **{f"every tile {w}": (partial(tiles, w, (16, 48)), TILES) for w in FORMATS},
}
SLOW = {case: pytest.mark.slow for case in CASES if case.startswith("every tile")}


@pytest.mark.parametrize("case", [pytest.param(case, marks=SLOW.get(case, ())) for case in CASES])
def test_compiles(case: str, compiled: list[tuple[str, Any]]) -> None:
    load_ops()
    call, kernels = CASES[case]
    call()
    assert kernels <= {name for name, _ in compiled}


@pytest.mark.parametrize("weights", ["int4", *(pytest.param(w, marks=pytest.mark.slow) for w in FORMATS[2:])])
def test_products_of_unpacked_weights(weights: str, compiled: list[tuple[str, Any]]) -> None:
    """Nothing writes registers that tensor cores still read, and a step of the loop waits for its products once."""
    load_ops()
    tiles(weights, (16, 48))
    code = [(name, kernel.asm["sass"]) for name, kernel in compiled if name.startswith("_tiles")]
    assert {name for name, _ in code} == {"_tiles_up_kernel", "_tiles_down_kernel", "_tiles_kernel"}
    for _, sass in code:
        assert overwritten(sass) == []
        waits = products_a_wait(sass)
        assert waits and min(waits) >= 4


def test_descriptors_feed_wide_products(compiled: list[tuple[str, Any]]) -> None:
    """The copy engine's loads, and products of 256 weight rows with both operands in shared memory."""
    load_ops()
    descriptors()
    code = {name: kernel.asm["sass"] for name, kernel in compiled}
    for name in ("_up_kernel", "_down_kernel"):
        assert "UTMALDG" in code[name] and "HGMMA.64x256x16" in code[name] and "STL" not in code[name]


@pytest.mark.parametrize(
    ("weights", "product"),
    [pytest.param("fp8", "QGMMA.64x128x32", marks=pytest.mark.slow), ("int8", "IGMMA.64x128x32")],
)
def test_eight_bits_are_multiplied_as_they_are_stored(
    weights: str, product: str, compiled: list[tuple[str, Any]]
) -> None:
    """Both halves of 64 inputs in one product, weights from shared memory, hardly a spill and nothing unpacked."""
    load_ops()
    halves(weights, more=16 if weights == "int8" else 0)
    code = [(name, kernel.asm["sass"]) for name, kernel in compiled]
    found = [sass for name, sass in code if name in ("_up_kernel", "_down_kernel", "_halves_kernel")]
    assert len(found) == 3
    for sass in found:
        assert product in sass and "UTMALDG" in sass and sass.count("STL") <= 16 and "UNPACK" not in sass
    # A value rounded to e4m3 and read again is read from a register that nobody wrote (Triton 3.6).
    for sass in (sass for name, sass in code if name == "_halve_kernel"):
        assert "UNPACK" not in sass and ("F2FP.SATFINITE.E4M3" in sass) == (weights == "fp8")


LOOP = """
LBB3:
--:-:1:-:4\tLDS R41, [R18+UR5+0x3800];
--:-:-:-:1\tHGMMA.64x16x16.F32.BF16 R24, R44, gdesc[UR20], R24;
--:-:-:-:1\tHGMMA.64x16x16.F32.BF16 R24, R40, gdesc[UR20], R24, gsb0;
--:-:-:Y:2\tWARPGROUP.DEPBAR.LE gsb0, 0x{left};
--:-:-:-:1\t@P0 IMAD.WIDE R46, R23, 0x2, R12;
--:-:-:-:5\t@!P1 BRA LBB3;
"""


def test_registers_of_products_in_flight() -> None:
    assert overwritten(LOOP.format(left=0)) == []
    wrong = overwritten(LOOP.format(left=1))
    assert [w.split(" overwritten by ")[1].split()[0] for w in wrong] == ["IMAD.WIDE", "LDS"]
    assert products_a_wait(LOOP.format(left=0)) == [2]


def test_no_tuple_within_a_tuple_is_assigned_to() -> None:
    """``a, (b, c) = …`` in a kernel: Triton 3.6 (torch 2.11) stops with a TypeError, later ones take it."""
    import ktfx.triton_kernels

    files = sorted(Path(str(ktfx.triton_kernels.__file__)).parent.glob("*.py"))
    assert len(files) > 20
    for file in files:
        kernels = [
            node
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.FunctionDef) and any(ast.unparse(d) == "triton.jit" for d in node.decorator_list)
        ]
        tuples = [
            target
            for kernel in kernels
            for statement in ast.walk(kernel)
            if isinstance(statement, ast.Assign)
            for target in statement.targets
            if isinstance(target, ast.Tuple)
        ]
        nested = [t for t in tuples if any(isinstance(part, ast.Tuple) for part in t.elts)]
        assert not nested, f"{file.name}, line {nested[0].lineno}: two statements"
