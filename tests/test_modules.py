"""The pieces of a layer: the short convolution against torch's, packing and padding back."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from miras.modules import ShortConvolution
from miras.packing import Packing


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 3, 9])
def test_convolution_is_torchs(width: int, length: int) -> None:
    torch.manual_seed(0)
    conv = ShortConvolution(5, width).double()
    x = torch.randn(2, length, 5, dtype=torch.float64, requires_grad=True)
    y, _ = conv(x)
    want = F.conv1d(x.mT, conv.weight, padding=width - 1, groups=5)[..., :length].mT
    torch.testing.assert_close(y, want, rtol=0, atol=1e-14)
    grad = torch.randn_like(y)
    ours = torch.autograd.grad(y, (x, conv.weight), grad)
    theirs = torch.autograd.grad(want, (x, conv.weight), grad)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_convolution_derivatives() -> None:
    torch.manual_seed(0)
    conv = ShortConvolution(2, 3).double()
    x = torch.randn(1, 4, 2, dtype=torch.float64, requires_grad=True)
    tail = torch.randn(1, 2, 2, dtype=torch.float64, requires_grad=True)

    def run(x: torch.Tensor, tail: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.func.functional_call(conv, {"weight": weight}, (x, tail, None, True))

    assert torch.autograd.gradcheck(run, (x, tail, conv.weight))
    assert torch.autograd.gradgradcheck(run, (x, tail, conv.weight))


def test_convolution_tails() -> None:
    torch.manual_seed(0)
    conv, x = ShortConvolution(3, 4), torch.randn(2, 9, 3)
    whole, last = conv(x, keep=True)
    assert torch.equal(last, x[:, -3:])
    for split in (1, 2, 5):
        start, tail = conv(x[:, :split], keep=True)
        end, tail = conv(x[:, split:], tail, keep=True)
        assert torch.equal(torch.cat((start, end), 1), whole)
        assert torch.equal(tail, last)


def test_packed_convolution() -> None:
    torch.manual_seed(0)
    conv, rows = ShortConvolution(3, 4), [torch.randn(1, n, 3) for n in (2, 5, 1)]
    tails = torch.randn(3, 3, 3)
    packing = Packing.from_cu_seqlens(torch.tensor([0, 2, 7, 8]), 1, 8)
    y, after = conv(torch.cat(rows, 1), tails, packing, keep=True)
    apart = [conv(row, tails[i : i + 1], keep=True) for i, row in enumerate(rows)]
    assert torch.equal(y, torch.cat([a for a, _ in apart], 1))
    assert torch.equal(after, torch.cat([tail for _, tail in apart]))


def test_packing_and_padding_back() -> None:
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 0]])
    packing = Packing.from_mask(mask, 3, 4)
    assert packing is not None
    assert packing.bounds.tolist() == [0, 3, 5]
    assert packing.rows.tolist() == [0, 2]
    assert packing.position.tolist() == [0, 1, 2, 0, 1]
    assert packing.sequence.tolist() == [0, 0, 0, 1, 1]
    x = torch.arange(1, 13.0).view(3, 4, 1)
    packed = packing.pack(x)
    assert packed.flatten().tolist() == [2, 3, 4, 9, 11]
    assert torch.equal(packing.pad(packed), x * mask[..., None])
    assert Packing.from_mask(torch.ones(3, 4), 3, 4) is None
    assert Packing.from_mask(torch.tensor([[0, 1, 1]]), 1, 2) is None
