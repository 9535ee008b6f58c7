"""ktfx::attention_decode without a GPU: against SDPA and gpt-oss's eager attention, symbolic sizes, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

import ktfx.ops.attention  # noqa: F401
from ktfx.errors import KtfxError

decode = torch.ops.ktfx.attention_decode
masked = torch.ops.ktfx.attention_decode_masked
bounds_of = torch.ops.ktfx.mask_bounds


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_is_sdpa_over_the_valid_part() -> None:
    q, k, v = torch.randn(2, 8, 1, 16), torch.randn(2, 2, 40, 16), torch.randn(2, 2, 40, 12)
    k[:, :, 21:], v[:, :, 21:] = float("nan"), float("nan")
    out = decode(q, k, v, torch.tensor(21), 0.3)
    expected = F.scaled_dot_product_attention(q, k[:, :, :21], v[:, :, :21], scale=0.3, enable_gqa=True)
    assert torch.allclose(out, expected, atol=1e-6)
    windowed = decode(q, k, v, torch.tensor(21), 0.3, 5)
    expected = F.scaled_dot_product_attention(q, k[:, :, 16:21], v[:, :, 16:21], scale=0.3, enable_gqa=True)
    assert torch.allclose(windowed, expected, atol=1e-6)


def test_sinks_are_those_of_gpt_oss() -> None:
    from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss

    q, k, v = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16)
    module = torch.nn.Module()
    module.sinks, module.num_key_value_groups, module.training = torch.randn(4), 2, False
    expected, _ = gpt_oss.eager_attention_forward(module, q, k, v, None, 0.25)
    out = decode(q, k, v, torch.tensor([9]), 0.25, 0, module.sinks)
    assert torch.allclose(out.transpose(1, 2), expected, atol=1e-6)


@pytest.mark.parametrize("hidden", [float("-inf"), torch.finfo(torch.float32).min])
def test_masked_sinks_are_those_of_gpt_oss(hidden: float) -> None:
    from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss

    q, k, v = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    keep = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0, 0, 0]]).bool().view(2, 1, 1, 9)
    added = torch.zeros(keep.shape).masked_fill(~keep, hidden)
    module = torch.nn.Module()
    module.sinks, module.num_key_value_groups, module.training = torch.randn(4), 2, False
    expected, _ = gpt_oss.eager_attention_forward(module, q, k, v, added, 0.25)
    for mask in (added, keep):
        out = masked(q, k, v, mask, 0.25, module.sinks, 0.0, bounds_of(mask))
        assert torch.allclose(out.transpose(1, 2), expected, atol=1e-6)
    assert bounds_of(added).tolist() == bounds_of(keep).tolist() == [[2, 5], [4, 5]]


def test_a_cap_comes_before_the_mask() -> None:
    q, k, v = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16)
    keep = torch.arange(9).view(1, 1, 1, 9) < 5
    out = masked(q, k, v, keep, 0.25, None, 1.5)
    assert torch.allclose(out, decode(q, k, v, torch.tensor(5), 0.25, 0, None, 1.5), atol=1e-6)


def test_bounds_with_symbolic_sizes() -> None:
    def call(mask: torch.Tensor) -> torch.Tensor:
        return bounds_of(mask)

    traced = make_fx(call, tracing_mode="symbolic")(torch.ones(2, 1, 1, 7, dtype=torch.bool))
    keep = torch.arange(11).view(1, 1, 1, 11).expand(3, 1, 1, 11) > 4
    assert traced(keep).tolist() == [[5, 11]] * 3


def test_fake_with_symbolic_sizes() -> None:
    def call(q: torch.Tensor, k: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        return decode(q, k, k, n, 0.25)

    def inputs(B: int, L: int) -> tuple[torch.Tensor, ...]:
        return torch.randn(B, 4, 1, 16), torch.randn(B, 2, L, 16), torch.full((B,), L - 3)

    traced = make_fx(call, tracing_mode="symbolic")(*inputs(2, 30))
    other = inputs(3, 40)
    assert torch.equal(traced(*other), call(*other))


def test_errors_say_what_was_expected() -> None:
    q, k = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 9, 16)
    n = torch.tensor([9])
    with pytest.raises(KtfxError, match="scaled_dot_product_attention"):
        decode(torch.randn(2, 4, 3, 16), k, k, n, 0.25)
    with pytest.raises(KtfxError, match="Hkv dividing Hq"):
        decode(torch.randn(2, 3, 1, 16), k, k, n, 0.25)
    with pytest.raises(KtfxError, match="one for each of 2"):
        decode(q, k, k, torch.tensor([9, 9, 9]), 0.25)
    with pytest.raises(KtfxError, match="one a query head"):
        decode(q, k, k, n, 0.25, 0, torch.zeros(2))
    with pytest.raises(KtfxError, match="one a query head"):
        masked(q, k, k, None, 0.25, torch.zeros(2))
    keep = torch.ones(1, 1, 1, 9, dtype=torch.bool)
    for wrong in (torch.zeros(2, 2, dtype=torch.int32), torch.zeros(1, 2)):
        with pytest.raises(KtfxError, match="got bounds"):
            masked(q, k, k, keep, 0.25, None, 0.0, wrong)
