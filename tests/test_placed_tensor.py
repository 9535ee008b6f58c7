"""Eager code that touches a placed tensor computes with the right numbers, or is refused; nothing is lost."""

from __future__ import annotations

import pytest
import torch

from ktfx.errors import KtfxError
from ktfx.placed_tensor import PlacedTensor, physical_of


def placed(data: torch.Tensor, name: str = "gpu0") -> PlacedTensor:
    return PlacedTensor(data.clone(), name, torch.device("cpu"))


@pytest.fixture
def data():
    return torch.arange(12.0).reshape(3, 4)


def test_it_reports_the_logical_device_and_keeps_the_physical_one(data):
    p = placed(data)
    assert p.device.type == "cpu" and p.shape == (3, 4) and p.dtype == torch.float32
    assert p.device_name == "gpu0" and physical_of(p).data_ptr() != data.data_ptr()


@pytest.mark.parametrize(
    "read",
    [lambda t: t + 1, lambda t: t @ t.T, lambda t: torch.cat([t, t]), lambda t: t.sum(0), lambda t: t[1:].mean()],
)
def test_reads_fetch(data, read):
    out = read(placed(data))
    assert not isinstance(out, PlacedTensor) or torch.equal(out.fetch(), read(data))
    assert torch.equal(out.fetch() if isinstance(out, PlacedTensor) else out, read(data))


def test_a_fetch_is_a_copy(data):
    p = placed(data)
    p.fetch().fill_(-1)
    assert torch.equal(p.fetch(), data)


@pytest.mark.parametrize(
    "write",
    [
        lambda t: t.index_copy_(0, torch.tensor([1]), torch.full((1, 4), 7.0)),
        lambda t: t.add_(5),
        lambda t: t.zero_(),
        lambda t: t.copy_(torch.ones(3, 4)),
        lambda t: t[1].fill_(9),
        lambda t: t.view(4, 3).mul_(2),
        lambda t: t[:, 1:3].copy_(torch.zeros(3, 2)),
        lambda t: torch.add(torch.ones(3, 4), 1, out=t),
        lambda t: t.__setitem__((slice(None), torch.tensor([0, 2])), torch.ones(3, 2)),
    ],
)
def test_writes_reach_the_physical_tensor(data, write):
    p, plain = placed(data), data.clone()
    write(p)
    write(plain)
    assert torch.equal(p.physical, plain)
    assert torch.equal(p.fetch(), plain)


def test_a_plain_tensor_can_be_written_from_a_placed_one(data):
    target = torch.zeros(3, 4)
    target.copy_(placed(data))
    assert torch.equal(target, data)


def test_reordering_for_beam_search_stays_placed(data):
    out = placed(data).index_select(0, torch.tensor([2, 0]))
    assert isinstance(out, PlacedTensor) and out.device_name == "gpu0"
    assert torch.equal(out.fetch(), data[[2, 0]])


def test_a_parameter_can_be_placed(data):
    parameter = torch.nn.Parameter(placed(data), requires_grad=False)
    assert isinstance(parameter, PlacedTensor) and torch.equal(parameter.detach().fetch(), data)


def test_a_write_to_two_places_at_once_is_refused(data):
    first, second = placed(data), torch.zeros(3, 4)
    with pytest.raises(KtfxError, match="different places at once"):
        torch._foreach_add_([first, second], 1.0)
