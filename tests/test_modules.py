"""The pieces of a layer: the short convolution and the norms against torch's, token shift, packing and padding back."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from miras.inputs import Output
from miras.modules import LowRank, OutputNorm, ShortConvolution, TokenShift, projection
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


def test_convolution_with_a_bias() -> None:
    conv = ShortConvolution(5, 4, bias=True).double()
    assert torch.equal(conv.bias, torch.zeros(5, dtype=torch.float64))
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    torch.nn.init.normal_(conv.bias)
    want = F.conv1d(x.mT, conv.weight, conv.bias, padding=3, groups=5)[..., :7].mT
    torch.testing.assert_close(conv(x)[0], want, rtol=0, atol=1e-14)


def test_token_shift() -> None:
    shift = TokenShift(3, ("a", "b")).double()
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    before = torch.cat((torch.zeros(2, 1, 3, dtype=torch.float64), x[:, :-1]), 1)
    found, tail = shift(x, keep=True)
    assert torch.equal(tail, x[:, -1:])
    for name in ("a", "b"):
        torch.nn.init.normal_(shift.get_parameter(name))
    found, _ = shift(x)
    for name, y in found.items():
        torch.testing.assert_close(y, x + shift.get_parameter(name) * (before - x), rtol=0, atol=1e-14)
    first, tail = shift(x[:, :2], keep=True)
    second, _ = shift(x[:, 2:], tail)
    torch.testing.assert_close(torch.cat((first["b"], second["b"]), 1), found["b"], rtol=0, atol=1e-14)


NORMS = {
    "rms": lambda x, w, b: F.rms_norm(x, (4,), eps=1e-3) * w,
    "layer": lambda x, w, b: F.layer_norm(x, (4,), eps=1e-3) * w + b,
    "rms, own": lambda x, w, b: F.rms_norm(x, (4,), eps=1e-3) * w.view(6, 4),
    "layer, own": lambda x, w, b: F.group_norm(x.flatten(-2).view(-1, 24), 6, w, b, eps=1e-3).view(x.shape),
    "rms 1": lambda x, w, b: F.rms_norm(x.flatten(-2), (24,), w, eps=1e-3).view(x.shape),
    "layer 1": lambda x, w, b: F.layer_norm(x.flatten(-2), (24,), w, b, eps=1e-3).view(x.shape),
    "rms 2": lambda x, w, b: F.rms_norm(x.unflatten(-2, (2, 3)).flatten(-2), (12,), eps=1e-3).view(x.shape) * w.view(6, 4),
    "layer 3": lambda x, w, b: F.group_norm(x.flatten(-2).view(-1, 24), 3, w, b, eps=1e-3).view(x.shape),
}


@pytest.mark.parametrize("name", NORMS)
def test_output_norms_are_torchs(name: str) -> None:
    kind, _, number = name.replace(",", "").partition(" ")
    output = Output(kind, groups=int(number) if number.isdigit() else None, shared=number != "own")
    norm = OutputNorm(output, 6, 4, 1e-3).double()
    assert len(norm.weight) == (4 if number == "" else 24)
    for p in norm.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(2, 3, 6, 4, dtype=torch.float64)
    torch.testing.assert_close(norm(x), NORMS[name](x, norm.weight, norm.bias), rtol=0, atol=1e-12)
    half = norm.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16


def test_low_rank() -> None:
    low = LowRank(5, 2, 3, "tanh", bias=True).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    torch.testing.assert_close(low(x), (x @ low[0].weight.T).tanh() @ low[1].weight.T + low[1].bias)
    assert low[0].bias is None


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


@pytest.mark.parametrize(
    ("rank", "between", "message"),
    [(0, None, "rank=0; must be at least 1"), (4, "relu6", "between='relu6'; allowed"), (None, "tanh", "give rank")],
)
def test_projections_that_cannot_be(rank: int | None, between: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        projection(8, 4, rank, between)
