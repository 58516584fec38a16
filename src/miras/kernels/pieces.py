"""A traced graph on tensors as one on pieces of them, none of which is longer than `limit` along any axis.

A product becomes the sum of products of pieces, a reduction that of the reductions of pieces, and what is done number by
number is done piece by piece. Programs whose tiles lie in registers and shared memory so take matrices of any size.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from miras.kernels.pointwise import POINTWISE, Untranslatable

aten = torch.ops.aten

Index = tuple[int, ...]


def counts(shape: Sequence[int], limit: int) -> Index:
    """Pieces along every axis. Raises Untranslatable."""
    for n in shape:
        if n > limit and n % limit:
            raise Untranslatable(f"an axis of {n}, which {limit} does not divide")
    return tuple(max(n // limit, 1) for n in shape)


def grid(shape: Sequence[int], limit: int) -> Iterator[Index]:
    """The places of a tensor's pieces, by rows."""
    return itertools.product(*map(range, counts(shape, limit)))


@dataclass
class Pieces:
    """A tensor's pieces, by place."""

    shape: tuple[int, ...]
    nodes: dict[Index, Node]

    def at(self, place: Index) -> Node:
        """What broadcasts to the piece at a place of another tensor."""
        place = place[len(place) - len(self.shape) :]
        return self.nodes[tuple(i if n != 1 else 0 for i, n in zip(place, self.shape, strict=True))]


def split(graph: Graph, limit: int) -> Graph:
    """The same function of the pieces of its inputs, one after another by rows, to those of its results.

    Raises:
        Untranslatable: an operation that moves numbers between pieces.
    """
    values = [node.meta["val"] for node in graph.nodes if node.op != "output"]
    if all(n <= limit for x in values if isinstance(x, torch.Tensor) for n in x.shape):
        return graph
    splitter = _Splitter(Graph(graph.owning_module), limit, {})
    for node in graph.nodes:
        splitter.add(node)
    return splitter.graph


@dataclass
class _Splitter:
    graph: Graph
    limit: int
    found: dict[Node, Pieces]

    def add(self, node: Node) -> None:
        if node.op == "output":
            results = cast("tuple[Node, ...]", node.args[0])
            self.graph.output(tuple(x for result in results for x in self.found[result].nodes.values()))
            return
        if not isinstance(node.meta["val"], torch.Tensor):
            raise Untranslatable(f"operation {node.target} gives several tensors, which are not divided into pieces")
        shape = _shape(node)
        if node.op == "call_function":
            name = _name(node)
            make = RULES.get(name, _each if name in POINTWISE else _undivided)(self, node)
        else:
            make = functools.partial(self._given, node)
        self.found[node] = Pieces(shape, {place: make(place) for place in grid(shape, self.limit)})

    def _given(self, node: Node, place: Index) -> Node:
        """An input, or a constant."""
        name = "_".join([node.name, *map(str, place)])
        made = self.graph.placeholder(name) if node.op == "placeholder" else self.graph.node_copy(node)
        made.meta = {"val": self.empty(node)}
        return made

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """An operation on pieces."""
        made = self.graph.call_function(target, args, kwargs)
        values = map_arg((args, kwargs), lambda x: x.meta["val"])
        made.meta["val"] = target(*values[0], **values[1])
        return made

    def piece(self, x: Any, place: Index) -> Any:
        """What an operation at a place reads of an operand that broadcasts to it."""
        return self.found[x].at(place) if isinstance(x, Node) else x

    def size(self, shape: Sequence[int]) -> list[int]:
        """The shape of a piece."""
        return [min(n, self.limit) for n in shape]

    def empty(self, node: Node) -> torch.Tensor:
        """Something of the shape and type of a piece of a node."""
        value = node.meta["val"]
        return torch.empty(self.size(value.shape), dtype=value.dtype, device="meta")

    def require_whole(self, node: Node, x: Node, *axes: int) -> None:
        """That what a node reads or gives is not divided along some axes. Raises Untranslatable."""
        longest = max((_shape(x)[axis] for axis in axes), default=0)
        if longest > self.limit:
            raise Untranslatable(f"{node.target} along an axis of {longest}, which is divided into pieces of {self.limit}")


Make = Callable[[Index], Node]
"""The piece of a node at a place."""

Rule = Callable[[_Splitter, Node], Make]


def _name(node: Node) -> str:
    """An operation without its overload."""
    return str(node.target).removeprefix("aten.").removeprefix("prims.").rpartition(".")[0]


def _shape(x: Any) -> tuple[int, ...]:
    return tuple(x.meta["val"].shape)


def _each(splitter: _Splitter, node: Node) -> Make:
    """Number by number."""
    return lambda place: splitter.call(node.target, *(splitter.piece(x, place) for x in node.args), **node.kwargs)


def _cast(splitter: _Splitter, node: Node) -> Make:
    """The same numbers in another type."""
    dtype = node.meta["val"].dtype
    return lambda place: splitter.call(aten._to_copy.default, splitter.piece(node.args[0], place), dtype=dtype)


def _undivided(splitter: _Splitter, node: Node) -> Make:
    """An operation of which nothing is known, on what is no longer than a piece."""
    if any(n > splitter.limit for x in (*node.all_input_nodes, node) for n in _shape(x)):
        raise Untranslatable(f"operation {node.target} has no form here on tensors longer than {splitter.limit}")

    made = splitter.graph.node_copy(node, lambda x: splitter.found[x].nodes[(0,) * len(_shape(x))])
    made.meta = {"val": splitter.empty(node)}
    return lambda _: made


def _view(splitter: _Splitter, node: Node) -> Make:
    """The same numbers with or without axes of one."""
    x, shape = cast(Node, node.args[0]), _shape(node)
    before, after = ([i for i, n in enumerate(dims) if n != 1] for dims in (_shape(x), shape))
    if [_shape(x)[i] for i in before] != [shape[i] for i in after]:
        return _undivided(splitter, node)

    def make(place: Index) -> Node:
        there = [0] * len(_shape(x))
        for i, j in zip(before, after, strict=True):
            there[i] = place[j]
        return splitter.call(aten.reshape.default, splitter.found[x].nodes[tuple(there)], splitter.size(shape))

    return make


def _expand(splitter: _Splitter, node: Node) -> Make:
    size = splitter.size(_shape(node))
    return lambda place: splitter.call(aten.expand.default, splitter.piece(node.args[0], place), size)


def _permute(splitter: _Splitter, node: Node) -> Make:
    x = cast(Node, node.args[0])
    order = list(range(len(_shape(x))))
    if _name(node) == "permute":
        order = [i % len(order) for i in cast("list[int]", node.args[1])]
    else:
        i, j = (axis % len(order) for axis in cast("tuple[int, int]", node.args[1:] or (0, 1)))
        order[i], order[j] = order[j], order[i]

    def make(place: Index) -> Node:
        there = dict(zip(order, place, strict=True))
        piece = splitter.found[x].nodes[tuple(there[axis] for axis in range(len(order)))]
        return splitter.call(aten.permute.default, piece, order)

    return make


def _fill(splitter: _Splitter, node: Node) -> Make:
    """One number everywhere: a shape is among the arguments, or that of the first one is it."""
    args = [splitter.size(cast("list[int]", x)) if isinstance(x, (list, tuple)) else x for x in node.args]
    like, dtype = "like" in _name(node), node.meta["val"].dtype

    def make(place: Index) -> Node:
        given = [
            splitter.found[x].nodes[place if like else (0,) * len(_shape(x))] if isinstance(x, Node) else x for x in args
        ]
        made = splitter.call(node.target, *given, dtype=dtype, device="meta")
        made.kwargs = {"dtype": dtype}
        return made

    return make


COMBINED = {"sum": aten.add.Tensor, "amax": aten.maximum.default, "amin": aten.minimum.default}
"""What makes one reduction of those of two pieces."""


def _reduction(splitter: _Splitter, node: Node) -> Make:
    x, name = cast(Node, node.args[0]), _name(node)
    shape, several = _shape(x), counts(_shape(x), splitter.limit)
    given = cast("list[int]", node.args[1] if len(node.args) > 1 else [])
    axes = [axis % len(shape) for axis in given] or list(range(len(shape)))
    keep = bool(node.args[2]) if len(node.args) > 2 else bool(node.kwargs.get("keepdim", False))
    target: Any = {"sum": aten.sum.dim_IntList, "mean": aten.sum.dim_IntList}.get(name, node.target)

    def make(place: Index) -> Node:
        kept = iter(i for axis, i in enumerate(place) if not keep or axis not in axes)
        there = [range(several[axis]) if axis in axes else [next(kept)] for axis in range(len(shape))]
        nodes = [splitter.found[x].nodes[at] for at in itertools.product(*there)]
        parts = [splitter.call(target, piece, axes, keep) for piece in nodes]
        total = functools.reduce(functools.partial(splitter.call, COMBINED[name if name != "mean" else "sum"]), parts)
        return total if name != "mean" else splitter.call(aten.div.Scalar, total, math.prod(shape[i] for i in axes))

    return make


def _product(splitter: _Splitter, node: Node) -> Make:
    a, b = (splitter.found[x] for x in cast("tuple[Node, Node]", node.args))
    steps = counts(a.shape, splitter.limit)[-1]

    def make(place: Index) -> Node:
        *batch, i, j = place
        parts = [splitter.call(node.target, a.nodes[(*batch, i, k)], b.nodes[(*batch, k, j)]) for k in range(steps)]
        return functools.reduce(functools.partial(splitter.call, aten.add.Tensor), parts)

    return make


def _along(splitter: _Splitter, node: Node) -> Make:
    """Along axes that are not divided; where it is the gradient of a part, the whole's shape comes before the axis."""
    x, rest = cast(Node, node.args[0]), cast("list[Any]", list(node.args[1:]))
    axes = (-2, -1) if _name(node) in ("triu", "tril") else rest[0]
    if _name(node) == "slice_backward":
        rest[0], axes = splitter.size(rest[0]), rest[1]
    for y in (x, node):
        splitter.require_whole(node, y, *(axes if isinstance(axes, (list, tuple)) else (axes,)))
    return lambda place: splitter.call(node.target, splitter.found[x].nodes[place], *rest)


def _slice(splitter: _Splitter, node: Node) -> Make:
    """Rows that lie in one piece, or of an axis that is not divided."""
    given = (*cast("tuple[Any, ...]", node.args), *(0, None, None)[len(node.args) - 1 :])
    x, start, stop = cast(Node, given[0]), given[2], given[3]
    axis, limit = cast(int, given[1]) % len(_shape(x)), splitter.limit
    begin, end, _ = slice(start, stop).indices(_shape(x)[axis])
    piece = begin // limit
    if _shape(node) == _shape(x):
        return lambda place: splitter.found[x].nodes[place]
    if len(node.args) > 4 or max(end - 1, begin) // limit != piece:
        return _along(splitter, node)

    def make(place: Index) -> Node:
        there = (*place[:axis], piece, *place[axis + 1 :])
        return splitter.call(
            aten.slice.Tensor, splitter.found[x].nodes[there], axis, begin - piece * limit, end - piece * limit
        )

    return make


def _select(splitter: _Splitter, node: Node) -> Make:
    """One row along an axis."""
    x, axis, index = cast("tuple[Node, int, int]", node.args)
    axis %= len(_shape(x))
    splitter.require_whole(node, x, axis)
    return lambda place: splitter.call(node.target, splitter.found[x].nodes[(*place[:axis], 0, *place[axis:])], axis, index)


def _placed(splitter: _Splitter, node: Node) -> Make:
    """One row in the place of another one, or among zeros."""
    *whole, row, axis, index = (x for x in node.args if isinstance(x, (Node, int)))
    axis, shape = cast(int, axis) % len(_shape(node)), splitter.size(_shape(node))
    splitter.require_whole(node, node, axis)

    def make(place: Index) -> Node:
        piece = splitter.found[cast(Node, row)].nodes[place[:axis] + place[axis + 1 :]]
        if not whole:
            return splitter.call(node.target, piece, shape, axis, index)
        return splitter.call(node.target, splitter.found[cast(Node, whole[0])].nodes[place], piece, axis, index)

    return make


def _joined(splitter: _Splitter, node: Node) -> Make:
    """Tensors end to end, or one above the other."""
    parts, axis = cast("list[Node]", node.args[0]), cast(int, node.args[1] if len(node.args) > 1 else 0) % len(_shape(node))
    splitter.require_whole(node, node, axis)

    def make(place: Index) -> Node:
        there = place if _name(node) == "cat" else place[:axis] + place[axis + 1 :]
        return splitter.call(node.target, [splitter.found[x].nodes[there] for x in parts], axis)

    return make


RULES: dict[str, Rule] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "squeeze", "unsqueeze"), _view),
    **dict.fromkeys(("clone", "alias", "detach", "lift_fresh_copy", "convert_element_type", "fill"), _each),
    **dict.fromkeys(("transpose", "permute", "t"), _permute),
    **dict.fromkeys(("ones", "zeros", "full", "empty", "ones_like", "zeros_like", "full_like", "empty_like"), _fill),
    **dict.fromkeys(("new_ones", "new_zeros", "new_full", "new_empty"), _fill),
    **dict.fromkeys(("sum", "mean", "amax", "amin"), _reduction),
    **dict.fromkeys(("bmm", "mm"), _product),
    **dict.fromkeys(("cumsum", "flip", "slice_backward", "triu", "tril"), _along),
    **dict.fromkeys(("select_backward", "select_scatter"), _placed),
    **dict.fromkeys(("cat", "stack"), _joined),
    "_to_copy": _cast,
    "expand": _expand,
    "select": _select,
    "slice": _slice,
}
"""Operations that are more than number by number."""
