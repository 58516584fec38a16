"""Traced tensor operations as loops, products and running sums of a C++ program on one sequence and head (see `loops`).

Reshapes, transposes and parts are views of what they are of, and what is computed twice is computed once. Nothing here knows
any choice's formula. Every number is a `real` of `native.h`; a condition is 1 or 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch.fx import Graph, Node

from miras.kernels.loops import Buffer, Loop, Operand, Operation, Product, Ref, Running, Text, whole
from miras.kernels.pointwise import Untranslatable, folded, repeated, require_exact


def _call(name: str) -> Text:
    return lambda *x: f"{name}({', '.join(x)})"


def _compare(sign: str) -> Text:
    return lambda x, y: f"real({x} {sign} {y})"


def _clamp(x: str, low: str = "", high: str = "") -> str:
    x = f"max_({x}, {low})" if low else x
    return f"min_({x}, {high})" if high else x


POINTWISE: dict[str, Text] = {
    "add": lambda x, y: f"({x} + {y})",
    "sub": lambda x, y: f"({x} - {y})",
    "mul": lambda x, y: f"({x} * {y})",
    "div": lambda x, y: f"({x} / {y})",
    "pow": _call("pow_"),
    "neg": lambda x: f"(-{x})",
    "reciprocal": lambda x: f"(1 / {x})",
    "rsqrt": lambda x: f"(1 / sqrt_({x}))",
    "sigmoid": lambda x: f"(1 / (1 + exp_(-{x})))",
    "sinh": lambda x: f"(real(0.5) * (exp_({x}) - exp_(-{x})))",
    "cosh": lambda x: f"(real(0.5) * (exp_({x}) + exp_(-{x})))",
    **{name: _call(f"{name}_") for name in ("exp", "log", "erf", "tanh", "sin", "cos", "sqrt", "abs")},
    **dict.fromkeys(("sign", "sgn"), _call("sign_")),
    "maximum": _call("max_"),
    "minimum": _call("min_"),
    "clamp": _clamp,
    "clamp_min": lambda x, low: _clamp(x, low),
    "clamp_max": lambda x, high: _clamp(x, "", high),
    "softshrink_backward": lambda grad, x, width: f"(abs_({x}) > {width} ? {grad} : real(0))",
    "where": lambda mask, x, y: f"({mask} != 0 ? {x} : {y})",
    **{
        name: _compare(sign)
        for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="), ("eq", "=="), ("ne", "!="))
    },
    **dict.fromkeys(("logical_and", "bitwise_and"), lambda x, y: f"({x} * {y})"),
    **dict.fromkeys(("logical_or", "bitwise_or"), _call("max_")),
    **dict.fromkeys(("logical_not", "bitwise_not"), lambda x: f"(1 - {x})"),
}
"""Operations number by number, as expressions of their operands' texts."""


@dataclass
class Translation:
    """A graph's operations in order, and what each of its nodes is."""

    operations: list[Operation] = field(default_factory=list)
    values: dict[Node, Operand] = field(default_factory=dict)
    known: dict[tuple[object, ...], Ref] = field(default_factory=dict)

    def translate(self, graph: Graph, inputs: Sequence[Buffer]) -> list[tuple[Operand, tuple[int, ...]]]:
        """What the graph returns for its inputs, with its shapes. Raises Untranslatable."""
        given = iter(inputs)
        for node in graph.nodes:
            if node.op == "placeholder":
                self.values[node] = whole(next(given))
            elif node.op == "get_attr" and (constant := getattr(graph.owning_module, str(node.target))).numel() == 1:
                self.values[node] = float(constant.item())
            elif node.op == "call_function":
                self.values[node] = self._value(node)
            elif node.op != "output":
                raise Untranslatable(f"a graph node of kind {node.op} ({node.target}) is not an operation on tensors")
        (results,) = (node.args[0] for node in graph.nodes if node.op == "output")
        return [(self.values[x], _shape(x)) for x in cast("tuple[Node, ...]", results)]

    def _value(self, node: Node) -> Operand:
        name = str(node.target).removeprefix("aten.").removeprefix("prims.").rpartition(".")[0]
        if name in RULES:
            return RULES[name](self, node)
        if name not in POINTWISE:
            raise Untranslatable(f"operation {node.target} has no C++ form here (see miras.kernels.cxx)")
        if node.kwargs.get("alpha", 1) != 1:
            raise Untranslatable(f"{node.target} with alpha={node.kwargs['alpha']}")
        operands: list[Any] = [self.values[x] if isinstance(x, Node) else x for x in node.args]
        numbers = [None if isinstance(x, Ref) or x is None else float(x) for x in operands]
        found = folded(name, numbers)
        if found is not None:
            return self.spread(operands[found], _shape(node)) if isinstance(found, int) else found
        if name == "pow" and isinstance(operands[0], Ref) and (text := _known_power(numbers[1])) is not None:
            return self.loop(f"pow {numbers[1]}", text, _shape(node), operands[:1])
        if name == "pow" and isinstance(operands[1], Ref):
            # pow_ takes the logarithm of what may be below 0, which is right for no whole exponent.
            return self.loop("std pow", _call("std::pow"), _shape(node), operands)
        absent = tuple(x is None for x in operands)
        text = POINTWISE[name]
        if name == "clamp" and any(absent):
            text = (lambda x, high: _clamp(x, "", high)) if absent[1] else (lambda x, low: _clamp(x, low))
        return self.loop(f"{name} {absent}", text, _shape(node), [x for x in operands if x is not None])

    def ref(self, node: Any) -> Ref:
        """A node's numbers, where it stood for one number too."""
        value, shape = self.values[node], _shape(node)
        if isinstance(value, Ref):
            return value
        return self.loop("fill", lambda x: x, shape, [value])

    def spread(self, value: Operand, shape: tuple[int, ...]) -> Operand:
        """A value in a shape that it broadcasts to."""
        if not isinstance(value, Ref) or value.shape == shape:
            return value
        return _viewed(value, lambda x: x.expand(shape))

    def loop(
        self,
        key: str,
        text: Text,
        shape: tuple[int, ...],
        operands: Sequence[Any],
        reduce: str = "",
        axes: tuple[int, ...] = (),
        indexed: bool = False,
    ) -> Ref:
        """A new loop over `shape`, or the result of an equal one; operands of other shapes are spread."""
        spread = tuple(self.spread(x if isinstance(x, Ref) else float(x), shape) for x in operands)
        name = (key, shape, spread, reduce, axes)
        if name not in self.known:
            out = Buffer(tuple(1 if i in axes else n for i, n in enumerate(shape)))
            self.operations.append(Loop(out, shape, spread, text, reduce, axes, indexed))
            self.known[name] = whole(out)
        return self.known[name]


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _viewed(ref: Ref, view: Callable[[torch.Tensor], torch.Tensor]) -> Ref:
    """The view that torch makes of a tensor that lies like this one."""
    memory = torch.empty(2**40, device="meta")
    found = view(memory.as_strided(ref.shape, ref.strides, ref.offset))
    return Ref(ref.buffer, tuple(found.shape), tuple(found.stride()), int(found.storage_offset()))


def _known_power(exponent: float | None) -> Text | None:
    if exponent == 0.5:
        return lambda x: f"sqrt_({x})"
    if exponent is None or exponent != int(exponent) or exponent == 0:
        return None
    count = abs(int(exponent))
    return lambda x: f"({repeated(x, count)})" if exponent > 0 else f"(1 / ({repeated(x, count)}))"


Rule = Callable[[Translation, Node], Operand]


def _view(t: Translation, node: Node) -> Operand:
    value = t.values[cast(Node, node.args[0])]
    if not isinstance(value, Ref):
        return value

    def apply(x: torch.Tensor) -> torch.Tensor:
        return cast(Any, node.target)(x, *node.args[1:], **node.kwargs)

    if "view" in str(node.target) or "reshape" in str(node.target):
        shape = _shape(node)
        try:
            return _viewed(value, lambda x: x.view(shape))
        except RuntimeError:
            return _viewed(t.loop("copy", str, value.shape, [value]), lambda x: x.view(shape))
    return _viewed(value, apply)


def _same(t: Translation, node: Node) -> Operand:
    return t.values[cast(Node, node.args[0])]


def _cast(t: Translation, node: Node) -> Operand:
    source = cast(Node, node.args[0])
    before, after = source.meta["val"].dtype, node.meta["val"].dtype
    require_exact(before, after)
    if after != torch.bool or before == torch.bool:
        return t.values[source]
    return t.loop("bool", lambda x: f"real({x} != 0)", _shape(node), [t.ref(source)])


def _fill(t: Translation, node: Node) -> Operand:
    name, number = str(node.target).removeprefix("aten.").partition(".")[0], node.args[-1]
    if "ones" in name or "zeros" in name or name.startswith(("empty", "new_empty")):
        return float("ones" in name)
    if isinstance(number, Node):
        return t.spread(t.values[number], _shape(node))
    return float(cast(float, number))


def _reduction(reduce: str, mean: bool = False) -> Rule:
    def rule(t: Translation, node: Node) -> Operand:
        source = cast(Node, node.args[0])
        value, shape = t.values[source], _shape(source)
        given = node.args[1] if len(node.args) > 1 else None
        axes = tuple(sorted({i % len(shape) for i in cast("list[int]", given)})) if given else tuple(range(len(shape)))
        count = math.prod(shape[i] for i in axes)
        if not isinstance(value, Ref):
            return value * count if reduce == "+" and not mean else value
        found = value if count == 1 else t.loop("", str, shape, [value], reduce, axes)
        if mean:
            found = t.loop(f"mean {count}", lambda x: f"({x} / {count})", found.shape, [found])
        return _viewed(found, lambda x: x.view(_shape(node))) if found.shape != _shape(node) else found

    return rule


def _running(t: Translation, node: Node) -> Operand:
    x = t.ref(node.args[0])
    out = Buffer(x.shape)
    t.operations.append(Running(out, (x,), cast(int, node.args[1]) % len(x.shape)))
    return whole(out)


def _flip(t: Translation, node: Node) -> Operand:
    x = t.ref(node.args[0])
    strides, offset = list(x.strides), x.offset
    for axis in cast("list[int]", node.args[1]):
        offset += strides[axis] * (x.shape[axis] - 1)
        strides[axis] = -strides[axis]
    return t.loop("copy", str, x.shape, [x._replace(strides=tuple(strides), offset=offset)])


def _index(shape: Sequence[int], axis: int) -> str:
    """The name of the index along an axis."""
    axis %= len(shape)
    return f"i{sum(n != 1 for n in shape[:axis])}" if shape[axis] != 1 else "0"


def _triangle(sign: str) -> Rule:
    def rule(t: Translation, node: Node) -> Operand:
        shape, args = _shape(node), cast("tuple[int, ...]", node.args)
        diagonal = args[1] if len(args) > 1 else 0
        kept = f"{_index(shape, -1)} - {_index(shape, -2)} {sign} {diagonal}"
        value = t.values[cast(Node, node.args[0])]
        return t.loop(f"triangle {kept}", lambda x: f"({kept} ? {x} : real(0))", shape, [value], indexed=True)

    return rule


def _placed(t: Translation, node: Node) -> Operand:
    """The gradient of a slice or of one row: its numbers there, 0 elsewhere."""
    value, shape = t.values[cast(Node, node.args[0])], _shape(node)
    axis = cast(int, node.args[2]) % len(shape)
    if "select" in str(node.target):
        start = cast(int, node.args[3]) % shape[axis]
        stop, step = start + 1, 1
        value = _viewed(value, lambda x: x.unsqueeze(axis)) if isinstance(value, Ref) else value
    else:
        start, stop, _ = slice(node.args[3], node.args[4]).indices(shape[axis])
        step = node.args[5]
    if step != 1:
        raise Untranslatable(f"{node.target} with a step of {step}")
    return _put(t, shape, axis, [(start, stop, value)], 0.0)


def _scattered(t: Translation, node: Node) -> Operand:
    """A tensor with one row replaced."""
    shape = _shape(node)
    axis = cast(int, node.args[2]) % len(shape)
    start = cast(int, node.args[3]) % shape[axis]
    row = t.values[cast(Node, node.args[1])]
    row = _viewed(row, lambda x: x.unsqueeze(axis)) if isinstance(row, Ref) else row
    return _put(t, shape, axis, [(start, start + 1, row)], t.values[cast(Node, node.args[0])])


def _joined(t: Translation, node: Node) -> Operand:
    nodes, shape = cast("list[Node]", node.args[0]), _shape(node)
    axis = (cast(int, node.args[1]) if len(node.args) > 1 else 0) % len(shape)
    stops = list(itertools.accumulate(_shape(x)[axis] for x in nodes))
    pieces = [(stop - _shape(x)[axis], stop, t.values[x]) for x, stop in zip(nodes, stops, strict=True)]
    return pieces[0][2] if len(pieces) == 1 else _put(t, shape, axis, pieces, 0.0)


def _stacked(t: Translation, node: Node) -> Operand:
    shape = _shape(node)
    axis = cast("tuple[int, ...]", (*node.args, 0))[1] % len(shape)
    values = [t.values[x] for x in cast("list[Node]", node.args[0])]
    rows = [_viewed(x, lambda y: y.unsqueeze(axis)) if isinstance(x, Ref) else x for x in values]
    pieces = [(i, i + 1, x) for i, x in enumerate(rows)]
    return pieces[0][2] if len(pieces) == 1 else _put(t, shape, axis, pieces, 0.0)


def _put(
    t: Translation, shape: tuple[int, ...], axis: int, pieces: Sequence[tuple[int, int, Operand]], elsewhere: Operand
) -> Operand:
    """Pieces from one index to another along an axis, and what is elsewhere."""
    index, kept = _index(shape, axis), []
    for start, stop, value in pieces:
        if isinstance(value, Ref):
            # As if it had numbers along the whole axis: only those from start to stop are read.
            step = value.strides[axis] if stop - start > 1 else 0
            strides = [s if n == m else 0 for s, n, m in zip(value.strides, value.shape, shape, strict=True)]
            strides[axis] = step
            value = Ref(value.buffer, shape, tuple(strides), value.offset - step * start)
        kept.append((start, stop, value))

    def text(*x: str) -> str:
        found = x[-1]
        for (start, stop, _), piece in zip(kept, x, strict=False):
            found = f"({index} >= {start} && {index} < {stop} ? {piece} : {found})"
        return found

    places = [(start, stop) for start, stop, _ in kept]
    return t.loop(f"put {axis} {places}", text, shape, [*(x for _, _, x in kept), elsewhere], indexed=True)


def _product(t: Translation, node: Node) -> Operand:
    """a b for a [m, k] and b [k, n], or a batch of each."""
    if any(t.values[cast(Node, x)] == 0.0 for x in node.args):
        return 0.0
    a, b = (t.ref(x) for x in node.args)
    shape = _shape(node)
    if a.shape[-1] == 1:
        return t.loop("mul", POINTWISE["mul"], shape, [a, b])
    if len(shape) == 2:
        return _matrices(t, a, b)
    rows = [_matrices(t, *(_viewed(x, lambda y, i=i: y.select(0, i)) for x in (a, b))) for i in range(shape[0])]
    pieces = [(i, i + 1, _viewed(x, lambda y: y.unsqueeze(0))) for i, x in enumerate(rows)]
    return pieces[0][2] if len(pieces) == 1 else _put(t, shape, 0, pieces, 0.0)


def _matrices(t: Translation, a: Ref, b: Ref) -> Ref:
    """a b for two matrices."""
    name = ("product", a, b)
    if name not in t.known:
        out = Buffer((a.shape[0], b.shape[1]))
        t.operations.append(Product(out, (a, b)))
        t.known[name] = whole(out)
    return t.known[name]


RULES: dict[str, Rule] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "squeeze", "unsqueeze", "alias", "detach", "expand"), _view),
    **dict.fromkeys(("transpose", "permute", "t", "select", "slice"), _view),
    **dict.fromkeys(("lift_fresh_copy", "clone"), _same),
    **dict.fromkeys(("_to_copy", "convert_element_type"), _cast),
    **dict.fromkeys(("ones", "zeros", "full", "scalar_tensor", "fill", "empty"), _fill),
    **dict.fromkeys(("ones_like", "zeros_like", "full_like", "empty_like"), _fill),
    **dict.fromkeys(("new_ones", "new_zeros", "new_full", "new_empty"), _fill),
    **dict.fromkeys(("bmm", "mm"), _product),
    **dict.fromkeys(("select_backward", "slice_backward"), _placed),
    "sum": _reduction("+"),
    "mean": _reduction("+", mean=True),
    "amax": _reduction("max"),
    "amin": _reduction("min"),
    "cumsum": _running,
    "flip": _flip,
    "triu": _triangle(">="),
    "tril": _triangle("<="),
    "select_scatter": _scattered,
    "cat": _joined,
    "stack": _stacked,
}
"""Operations that are more than number by number."""
