"""Models whose experts are stored in fp8 blocks (transformers' FP8Experts): traced whole, and their bits kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import tiny_model
from torch import nn

import ktfx
from ktfx.adopt import adopt, give_up
from ktfx.errors import KtfxError, PlacementError
from ktfx.formats import dequantize, quantize
from ktfx.ops.experts import experts_kernel
from ktfx.ops.experts_layout import experts_layout, stored_layout
from ktfx.stored_weights import dequantize_blocks, kept_format

fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
EAGER: dict[str, Any] = {"simulate": "cpu", "partition_backend": "eager"}


def fp8_experts(experts: nn.Module, config: Any, block: tuple[int, int] | None, **options: Any) -> nn.Module:
    """transformers' module, made as its quantiser makes it for a checkpoint of this format."""
    from transformers.integrations.moe import use_experts_implementation

    cls = use_experts_implementation(experts_class=fp8.FP8Experts, experts_interface=fp8.ALL_FP8_EXPERTS_FUNCTIONS)
    made = cls(config, block_size=block, **options)
    for name in ("gate_up_proj", "down_proj"):
        weight, scales = getattr(experts, name).detach(), getattr(made, f"{name}_scale_inv")
        codes, found = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(scales.shape)
        for e in range(weight.shape[0]):
            codes[e], found[e] = rounded(weight[e], block, scales.shape[1])
        if scales.dtype != torch.float32:  # powers of two
            found = found.log2().ceil().exp2().to(scales.dtype)
        setattr(made, name, nn.Parameter(codes, requires_grad=False))
        setattr(made, f"{name}_scale_inv", nn.Parameter(found, requires_grad=False))
    return made.eval()


def rounded(weight: torch.Tensor, block: tuple[int, int] | None, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, K) to codes and scales of ``rows`` rows, written out block by block."""
    N, K = weight.shape
    n, k = block or (N // rows, K)
    n = min(n, N // rows) if rows * n > N + n - 1 else n
    scales = torch.zeros(rows, -(-K // k))
    codes = torch.empty(N, K, dtype=torch.float8_e4m3fn)
    for i in range(rows):
        for j in range(scales.shape[1]):
            at = slice(i * n, min((i + 1) * n, N)), slice(j * k, (j + 1) * k)
            scales[i, j] = weight[at].abs().max() / 448
            codes[at] = (weight[at] / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales


def plain_weights(module: Any, block: tuple[int, int] | None) -> dict[str, torch.Tensor]:
    return {
        name: torch.stack(
            [
                dequantize_blocks(codes, scales, block or (), torch.float32, name == "gate_up_proj")
                for codes, scales in zip(getattr(module, name), getattr(module, f"{name}_scale_inv"), strict=True)
            ]
        )
        for name in ("gate_up_proj", "down_proj")
    }


def pair(
    family: str = "qwen3_moe", block: tuple[int, int] | None = (128, 128), inter: int = 128, **options: Any
) -> tuple[nn.Module, nn.Module]:
    """A small model with fp8 experts, and the same with their dequantised weights in plain ones."""
    model = tiny_model(family, layers=1, hidden_size=160, first_k_dense_replace=0, moe_intermediate_size=inter)
    plain = copy.deepcopy(model)
    for path, module in list(model.named_modules()):
        if path.endswith(".experts"):
            parent, _, leaf = path.rpartition(".")
            made = fp8_experts(module, model.config, block, **options)
            setattr(model.get_submodule(parent), leaf, made)
            for name, weight in plain_weights(made, block).items():
                getattr(plain.get_submodule(path), name).data.copy_(weight)
    return model, plain


def rules(**replace: Any) -> dict[str, Any]:
    found: list[dict[str, Any]] = [{"match": {"module": "experts"}, "replace": replace}] if replace else []
    return {"ktfx": 1, "devices": {"gpu0": "cuda:0", "host": "cpu"}, "default_device": "gpu0", "rules": found}


def run(model: nn.Module, given: Any, verify: bool = False) -> torch.Tensor:
    torch._dynamo.reset()
    ktfx.compile(model, given, verify=verify, **EAGER)
    with torch.no_grad():
        return model(torch.arange(2, 9)[None], use_cache=False).logits


def expected(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(2, 9)[None], use_cache=False).logits


def ops_of(model: nn.Module) -> Any:
    return ktfx.state_of(model).graphs[0].records[-1].ops_after


@pytest.mark.parametrize(
    ("family", "op", "weights"),
    [
        ("qwen3_moe", None, None),
        ("qwen3_moe", "experts.triton", None),
        ("deepseek_v3", "experts.triton", "fp8"),
        ("qwen3_moe", "experts.cpu", "fp8"),
    ],
)
def test_runs_on_the_stored_bits(family: str, op: str | None, weights: str | None) -> None:
    model, plain = pair(family)
    given = {} if op is None else {"op": op, **({"device": "host"} if op == "experts.cpu" else {})}
    given |= {"weights": weights} if weights else {}
    before = {n: p.detach().view(torch.uint8).clone() for n, p in model.named_parameters() if p.dtype.itemsize == 1}
    scales = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("_scale_inv")}
    assert len(before) == len(scales) == 2
    want = expected(plain)
    torch.testing.assert_close(run(model, rules(**given), verify=op is not None), want, atol=1e-4, rtol=1e-4)
    kernel = op in ("experts.triton", "experts.cpu")
    assert ops_of(model)["ktfx.routed_experts.default" if kernel else "ktfx.stored_experts.default"] == 1
    store = ktfx.state_of(model).store
    packed = [e for e in store.entries() if e.request is not None]
    if op == "experts.triton":
        assert not packed, "the kernel reads the stored tensors themselves"
        held = {e.names[0]: e.tensors[0] for e in store.entries() if e.device == "gpu0"}
        assert all(torch.equal(held[n].view(torch.uint8), bits) for n, bits in before.items())
        assert all(torch.equal(held[n], s) for n, s in scales.items())
    if op == "experts.cpu":
        for entry in packed:
            assert entry.request is not None and entry.format == "cpu:fp8"
            kept = experts_kernel("cpu").dequantised(entry.request.spec, entry.tensors)  # type: ignore[attr-defined]
            path = entry.request.parts[0][1].rpartition(".")[0]
            for name, part in (("gate_up_proj", "gate_up"), ("down_proj", "down")):
                assert torch.equal(kept[part], plain.get_parameter(f"{path}.{name}"))
        assert all(e.error == 0 for e in ktfx.state_of(model).quantisation_errors())
    own = dict(model.named_parameters())
    assert all(torch.equal(own[n].view(torch.uint8), bits) for n, bits in before.items())


def test_scales_of_powers_of_two() -> None:
    model, plain = pair(scale_fmt="ue8m0")
    scales = model.model.layers[0].mlp.experts.down_proj_scale_inv  # type: ignore[union-attr]
    assert scales.dtype == torch.float8_e8m0fnu
    want = expected(plain)
    torch.testing.assert_close(run(model, rules(op="experts.triton")), want, atol=1e-4, rtol=1e-4)
    (entry, *_) = [e for e in ktfx.state_of(model).store.entries() if e.request is not None]
    assert entry.format == "triton:fp8" and entry.tensors[1].dtype == torch.float32


def test_another_format_is_made_of_the_dequantised_weights() -> None:
    model, plain = pair()
    with torch.no_grad():
        for path, module in plain.named_modules():
            if path.endswith(".experts"):
                for weight in (module.gate_up_proj, module.down_proj):
                    weight.copy_(dequantize(quantize(weight.bfloat16(), "int8", search=True)))  # type: ignore[operator,arg-type]
    got = run(model, rules(op="experts.triton", weights="int8"))
    torch.testing.assert_close(got, expected(plain), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(("block", "inter"), [((128, 128), 64), (None, 128)])
def test_blocks_that_kernels_have_not(block: tuple[int, int] | None, inter: int) -> None:
    """Rows of gate and up that end inside a block, other blocks, one scale a matrix: ATen runs them, kernels refuse."""
    model, plain = pair(block=block, inter=inter)
    want = expected(plain)
    with pytest.warns(ktfx.KtfxWarning, match="kernels read 128 × 128"):
        got = run(model, rules(op="experts.triton"))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert ops_of(model)["ktfx.stored_experts.default"] == 1
    named = rules()
    named["rules"] = [{"match": {"name": r"mlp\.experts$"}, "replace": {"op": "experts.triton"}}]
    with pytest.raises(PlacementError, match="kernels read 128 × 128"):
        run(model, named)


def test_generation_with_a_cache() -> None:
    model, plain = pair()
    ids = torch.arange(2, 9)[None]
    want = plain.generate(ids, max_new_tokens=8, do_sample=False)  # type: ignore[operator]
    torch._dynamo.reset()
    ktfx.compile(model, rules(op="experts.cpu", device="host"), **EAGER)
    assert model.generate(ids, max_new_tokens=8, do_sample=False).tolist() == want.tolist()  # type: ignore[operator]


def test_the_modules_own_forward_comes_back() -> None:
    model, _ = pair()
    experts = [m for p, m in model.named_modules() if p.endswith(".experts")]
    assert all(stored_layout(m) is not None for m in experts) and adopt(model) == 1 and adopt(model) == 0
    give_up(model)
    assert not any({"forward", "stored_call"} & set(m.__dict__) for m in experts)


def test_a_gate_that_is_clamped() -> None:
    model, _ = pair()
    config = copy.deepcopy(model.config)
    config.swiglu_alpha, config.swiglu_limit = 1.702, 7.0  # type: ignore[union-attr]
    layout = experts_layout(fp8.FP8Experts(config, block_size=(128, 128)))
    assert not isinstance(layout, str) and layout.spec.gate == "clamped" and layout.spec.weights == "fp8"
    config.swiglu_alpha = None
    assert "gate function" in str(experts_layout(fp8.FP8Experts(config, block_size=(128, 128))))


def test_a_rule_keeps_the_bits_where_it_allows_them() -> None:
    assert kept_format("int4-g128", "model") == kept_format("int4-g128", "int4") == "int4-g128"
    assert kept_format("int4zp", "int4") == "int4zp" and kept_format("int4", "int4-g32") == "int4-g32"
    assert kept_format("fp8", "int4") == "int4" and kept_format("fp8", "fp8") == "fp8"


def test_scales_that_do_not_fit() -> None:
    with pytest.raises(KtfxError, match="has scales"):
        dequantize_blocks(torch.zeros(8, 8).to(torch.float8_e4m3fn), torch.ones(3, 1), (4, 4), torch.float32)


def test_the_ops_are_what_they_say() -> None:
    from ktfx.ops.experts import ExpertsSpec

    g = torch.Generator().manual_seed(0)
    parts = [quantize(torch.randn(3, *shape, generator=g), "int4-g32").tensors() for shape in ((32, 64), (64, 16))]
    spec = ExpertsSpec(num_experts=3, hidden=64, intermediate=16, weights="int4-g32").encode()
    x, ids = torch.randn(5, 64, generator=g), torch.randint(0, 3, (5, 2), generator=g)
    order = torch.stack([torch.randperm(64, generator=g) for _ in range(6)]).view(3, 2, 64)
    for given in (None, order):
        arguments = (x, ids, torch.rand(5, 2, generator=g), *parts, [], given, spec, [])
        torch.library.opcheck(torch.ops.ktfx.stored_experts.default, arguments)
    weight = quantize(torch.randn(24, 64, generator=g), "int4zp").tensors()
    for bias in (None, torch.randn(24, generator=g)):
        torch.library.opcheck(torch.ops.ktfx.stored_linear.default, (x.view(5, 1, 64), *weight, bias, "int4zp", []))
