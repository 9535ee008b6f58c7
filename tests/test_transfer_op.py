"""A transfer's fake has the strides that the program's copy really has; the units behind it are compiled for them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import ktfx.ops.transfer  # noqa: F401 (registers the op)
from ktfx.program.program import Transfer

LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as it is": lambda x: x,
    "transposed": lambda x: x.transpose(1, 2),
    "a slice": lambda x: x[..., :4],
    "a transposed slice": lambda x: x[..., :4].transpose(0, 2),
    "every second": lambda x: x[:, ::2],
    "expanded": lambda x: x[:, :1].expand(-1, 5, -1),
    "one row": lambda x: x[:, 1:2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout: str) -> None:
    value = LAYOUTS[layout](torch.randn(2, 6, 8))
    slots = [value, None]
    Transfer(0, 1, torch.device("cpu"), wait=True).run(slots)
    copy = slots[1]
    assert isinstance(copy, torch.Tensor) and torch.equal(copy, value) and copy.data_ptr() != value.data_ptr()
    with FakeTensorMode() as mode:
        fake = torch.ops.ktfx.transfer(LAYOUTS[layout](mode.from_tensor(torch.randn(2, 6, 8))), "a", "b")
    assert fake.stride() == copy.stride()
    assert torch.ops.ktfx.transfer(value, "a", "b").stride() == copy.stride()
