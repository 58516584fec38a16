"""Graphs on pieces of tensors against the graphs that they were made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from miras.kernels.graph import trace
from miras.kernels.pieces import grid, split
from miras.kernels.pointwise import Untranslatable

LIMIT = 4


def parts(x: Tensor) -> list[Tensor]:
    """The pieces of a tensor, by rows."""
    return [
        x[tuple(slice(i * LIMIT, (i + 1) * LIMIT) for i in place)] if place else x for place in grid(tuple(x.shape), LIMIT)
    ]


def graph_of(function: Callable[..., Any], *shapes: Sequence[int]) -> Graph:
    return trace(function, [torch.zeros(*shape, dtype=torch.float64) for shape in shapes]).graph


def assert_same(function: Callable[..., tuple[Tensor, ...]], *shapes: Sequence[int]) -> None:
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(*shape, generator=g, dtype=torch.float64) for shape in shapes]
    divided = GraphModule(torch.nn.Module(), split(graph_of(function, *shapes), LIMIT))
    found, expected = divided(*(y for x in inputs for y in parts(x))), [y for x in function(*inputs) for y in parts(x)]
    assert len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)
    assert max(n for node in divided.graph.nodes if node.op != "output" for n in node.meta["val"].shape) <= LIMIT


CASES: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "products": (lambda a, b: (a @ b, (a @ b).T @ a), [(2, 8), (8, 12)]),
    "batched product": (lambda a, b: (a @ b,), [(1, 8, 4), (1, 4, 12)]),
    "sums": (lambda x: (x.sum(0), x.sum(1, keepdim=True), x.sum(), x.sum((0, 2))), [(8, 4, 12)]),
    "means": (lambda x: (x.mean(1), x.mean((0, 1), keepdim=True)), [(8, 12)]),
    "extremes": (lambda x: (x.amax(1), x.amin(0, keepdim=True)), [(8, 12)]),
    "broadcasting": (lambda x, y, z: (x * y + z.unsqueeze(1), torch.where(x > y, x, 0.5)), [(8, 12), (12,), (8,)]),
    "axes": (lambda x: (x.permute(2, 0, 1).unsqueeze(1) * 2, x.transpose(0, 2), x.reshape(1, 8, 3, 12)), [(8, 3, 12)]),
    "expanded": (lambda x: (x.unsqueeze(0).expand(8, 12) + 1,), [(12,)]),
    "filled": (lambda x: (torch.zeros_like(x) + x.new_full((8, 12), 2.0) * torch.ones(12, dtype=x.dtype), x + 0), [(8, 12)]),
    "rows": (lambda x: (x[1], x[:, 1:3].cumsum(1), x.flip(0), torch.cat((x[:1], x[2:])), torch.stack((x, x))), [(3, 4, 8)]),
    "types": (lambda x: ((x > 0).to(x.dtype) * 2,), [(8, 12)]),
    "rows of a piece": (lambda x: (x[:, 5:7], x[..., :1], x[2:, 4:8], x.narrow(1, 0, 12) + 1), [(4, 12)]),
    "triangle": (lambda x, y: ((x @ x.T).tril() @ y,), [(4, 8), (4, 12)]),
}


@pytest.mark.parametrize("name", CASES)
def test_same_numbers(name: str) -> None:
    function, shapes = CASES[name]
    assert_same(function, *shapes)


def test_gradients_of_rows() -> None:
    def pulled(x: Tensor) -> tuple[Tensor, ...]:
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad((leaf[1] * leaf[0]).sum() + leaf[1:].square().sum() * leaf[2].sum(), leaf)

    assert_same(pulled, (3, 8))


def test_what_is_short_is_left_alone() -> None:
    graph = graph_of(lambda x: (x @ x,), (4, 4))
    assert split(graph, LIMIT) is graph


@pytest.mark.parametrize(
    ("function", "shape", "reason"),
    [
        (lambda x: (x.cumsum(1),), (3, 8), "cumsum.default along an axis of 8, which is divided into pieces of 4"),
        (lambda x: (x[:, 2:6],), (3, 8), "slice.Tensor along an axis of 8"),
        (lambda x: (x[:, 5],), (3, 8), "select.int along an axis of 8"),
        (lambda x: (torch.cat((x, x), 1),), (3, 4), "cat.default along an axis of 8"),
        (lambda x: (x.tril(),), (8, 8), "tril.default along an axis of 8"),
        (lambda x: (x.reshape(4, 6),), (3, 8), "view.default has no form here on tensors longer than 4"),
        (lambda x: (x.sort().values,), (3, 8), "sort.default gives several tensors"),
        (lambda x: (x + 1,), (3, 6), "an axis of 6, which 4 does not divide"),
    ],
)
def test_what_moves_numbers_between_pieces_is_refused(
    function: Callable[..., Any], shape: tuple[int, ...], reason: str
) -> None:
    with pytest.raises(Untranslatable, match=reason):
        split(graph_of(function, shape), LIMIT)
