"""ktfx::attention_decode without a GPU: against SDPA and gpt-oss's eager attention, symbolic sizes, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

import ktfx.ops.attention  # noqa: F401
from ktfx.errors import KtfxError

decode = torch.ops.ktfx.attention_decode


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
