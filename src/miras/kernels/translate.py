"""Traced tensor operations as the lines of a Triton program, one a node.

A value of the graph is a tile of registers without its axes of one: reshapes that only add or take away such axes, and
all of batch and heads are such, are no lines. A filled tensor stays a number until something needs it as a tile.
Products are tl.dot where every width is at least 16 and a sum of products otherwise; what reads or writes one row of a
tile is a mask over it, since registers have no index.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

from torch.fx import Graph, Node

from miras.choice import require
from miras.kernels.pointwise import POINTWISE, Untranslatable, folded, literal, power, require_exact

MIN_DOT = 16
"""Least width of a matrix product on tensor cores."""

MIN_ROWS = 64
"""Rows of a product that Hopper's warp groups take, whose warps Triton lays along the rows where another product follows.

With more columns than rows several warps would compute the same, so that the transpose is computed there.
"""

CHEAP = ("add", "sub", "transpose", "permute", "t")
"""Operations that are done again at every use where all that they read is."""

MAX_TILE = 2**20
"""Most numbers that Triton lets a tile have."""

OPERANDS = {
    "float64": "{}",
    "float32": "{}",
    "tf32": "{}",
    "bfloat16": "{}.to(tl.bfloat16)",
    "float16": "{}.to(tl.float16)",
    # Triton's interpreter keeps half-precision numbers as integers, and multiplies those.
    "bfloat16 rounded": "{}.to(tl.bfloat16).to(tl.float32)",
    "float16 rounded": "{}.to(tl.float16).to(tl.float32)",
}
"""What operands of a matrix product are made of a tile; sums are in float32, or in float64."""

PRECISIONS = {"float32": ', input_precision="tf32x3"', "tf32": ', input_precision="tf32"'}
"""How tensor cores multiply float32: each number as the sum of two of TF32, of whose products the largest three are kept,
which leaves float32's own precision but for the last bits; or as one."""


class Value(NamedTuple):
    """What a node is: the name of a tile, or the number that fills it; a `part` is rows [0] to [1] of one axis of `text`."""

    text: str
    shape: tuple[int, ...]
    number: float | bool | None = None
    part: tuple[int, int, int] | None = None

    @property
    def dims(self) -> tuple[int, ...]:
        return tile(self.shape)


def tile(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without its axes of one."""
    return tuple(n for n in shape if n != 1)


def spread(text: str, shape: Sequence[int], wanted: Sequence[int]) -> str:
    """A tile of `shape` indexed so that it broadcasts against the tile of `wanted`."""
    shape = (*[1] * (len(wanted) - len(shape)), *shape)
    marks = [":" if n != 1 else "None" for n, m in zip(shape, wanted, strict=True) if m != 1 or n != 1]
    return text if "None" not in marks or ":" not in marks else f"{text}[{', '.join(marks)}]"


def arange(shape: Sequence[int], axis: int) -> str:
    """The index along one axis, which broadcasts against a tile of `shape`."""
    return spread(f"tl.arange(0, {shape[axis]})", [n if i == axis else 1 for i, n in enumerate(shape)], shape)


def filled(number: float | bool, dims: Sequence[int], dtype: str) -> str:
    """A tile of one number."""
    kind = "tl.int1" if isinstance(number, bool) else dtype
    return f"tl.full({list(dims)}, {literal(number)}, {kind})"


@dataclass
class Body:
    """Lines that compute the nodes of a graph, their names beginning with `prefix`; `dtype` is that of every number.

    `remade` are tiles that are not kept in registers but loaded, or made of such ones, anew at every use, by name.
    """

    dtype: str
    operands: str
    prefix: str = ""
    remade: dict[str, str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    turned: dict[str, str] = field(default_factory=dict)
    values: dict[Node, Value] = field(default_factory=dict)

    def translate(self, graph: Graph, inputs: Sequence[str]) -> Iterator[Value]:
        """What the graph returns for inputs of these names, each as soon as its lines stand. Raises Untranslatable.

        A line stands right before the first one that reads it, so that few tiles are alive at once.
        """
        given = iter(inputs)
        for node in graph.nodes:
            if node.op == "placeholder":
                self.values[node] = Value(next(given), shape_of(node))
        (results,) = (node.args[0] for node in graph.nodes if node.op == "output")
        for result in cast("tuple[Node, ...]", results):
            waiting = [result]
            while waiting:
                node = waiting[-1]
                unread = [x for x in node.all_input_nodes if x not in self.values]
                if unread:
                    waiting += reversed(unread)
                    continue
                waiting.pop()
                if node not in self.values:
                    self.values[node] = self._value(node)
            yield self.values[result]

    def _value(self, node: Node) -> Value:
        if node.op == "get_attr" and (constant := getattr(node.graph.owning_module, str(node.target))).numel() == 1:
            return Value("", tuple(constant.shape), constant.item())
        if node.op != "call_function":
            raise Untranslatable(f"a graph node of kind {node.op} ({node.target}) is not an operation on tensors")
        name = _name(node)
        rule = RULES.get(name)
        if rule is None and name not in POINTWISE:
            raise Untranslatable(f"operation {node.target} has no Triton form here (see miras.kernels.translate)")
        value = self.pointwise(node, name) if rule is None else rule(self, node)
        require(
            math.prod(value.dims) <= MAX_TILE, f"{node.target} gives {value.dims}, more than Triton's {MAX_TILE} numbers"
        )
        return value

    def line(self, node: Node, text: str, number: float | bool | None = None) -> Value:
        """A node's own line, or the name of an equal one."""
        shape = shape_of(node)
        if text not in self.names:
            self.names[text] = name = f"{self.prefix}{node.name}"
            operands = [self.values[x].text for x in node.all_input_nodes]
            if _name(node) in CHEAP and all(x in self.remade for x in operands):
                self.remade[name] = text
            else:
                self.lines.append(f"{name} = {self.reading(text)}  # {list(tile(shape))}")
        return Value(self.names[text], shape, number)

    def reading(self, text: str) -> str:
        """The text with every tile that is made anew under a name of its own."""
        return re.sub(r"\w+", lambda found: self._remake(found[0]) if found[0] in self.remade else found[0], text)

    def _remake(self, name: str) -> str:
        text = self.reading(self.remade[name]) if "tl.load" not in self.remade[name] else self.remade[name]
        self.lines.append(f"{name}_at{len(self.lines)} = {text}")
        return self.lines[-1].partition(" = ")[0]

    def argument(self, node: Node, place: int) -> Value:
        """A tensor that a node reads."""
        value = self.values[cast(Node, node.args[place])]
        if value.part is not None:
            raise Untranslatable(f"{node.target} of some rows of a tile ({value.part[1]} to {value.part[2]})")
        return value

    def whole(self, value: Value, shape: Sequence[int] | None = None) -> str:
        """A value as a tile of its own shape, or of one that it broadcasts to."""
        dims = tile(value.shape if shape is None else shape)
        if value.number is not None:
            return filled(value.number, dims, self.dtype)
        if shape is None or value.dims == dims:
            return value.text
        return f"tl.broadcast_to({spread(value.text, value.shape, shape)}, {list(dims)})"

    def pointwise(self, node: Node, name: str) -> Value:
        """Number by number, with broadcasting."""
        shape = shape_of(node)
        values = [self._operand(node, x) for x in range(len(node.args))]
        if name in ("add", "sub") and "alpha" in node.kwargs:
            raise Untranslatable(f"{node.target} with alpha={node.kwargs['alpha']}")
        found = folded(name, [x.number for x in values])
        if found is not None:
            return self._reshaped(node, values[found] if isinstance(found, int) else Value("", (), found))
        if all(x.number is not None for x in values):
            values[0] = Value(self.whole(values[0]), values[0].shape)
        elif name == "where" and values[1].number is not None and values[2].number is not None:
            values[1] = Value(self.whole(values[1], shape), shape)
        texts = [spread(x.text, x.shape, shape) if x.number is None else literal(x.number) for x in values]
        known = [x.shape for x in values if x.number is None]
        text = POINTWISE[name](*texts) if name != "pow" else power(texts[0], values[1].number)
        if tile(_joint(known, len(shape))) != tile(shape):
            text = f"tl.broadcast_to({spread(f'({text})', _joint(known, len(shape)), shape)}, {list(tile(shape))})"
        return self.line(node, text)

    def _operand(self, node: Node, place: int) -> Value:
        x = node.args[place]
        if isinstance(x, Node):
            return self.argument(node, place)
        number = x if isinstance(x, bool) or x is None else float(cast(float, x))
        return Value("", (), number)

    def _reshaped(self, node: Node, value: Value) -> Value:
        """The same numbers in the node's shape, which may broadcast them."""
        shape = shape_of(node)
        if value.number is not None or value.dims == tile(shape):
            return value._replace(shape=shape)
        return self.line(node, self.whole(value, shape))


Rule = Callable[[Body, Node], Value]


def _name(node: Node) -> str:
    """An operation without its overload."""
    return str(node.target).removeprefix("aten.").removeprefix("prims.").rpartition(".")[0]


def shape_of(node: Node) -> tuple[int, ...]:
    """The shape that was traced."""
    return tuple(node.meta["val"].shape)


def _joint(shapes: Sequence[Sequence[int]], length: int) -> tuple[int, ...]:
    """What shapes broadcast to."""
    padded = [(*[1] * (length - len(x)), *x) for x in shapes]
    return tuple(max(column) for column in zip(*padded, strict=True)) if padded else (1,) * length


def _view(body: Body, node: Node) -> Value:
    value, shape = body.values[cast(Node, node.args[0])], shape_of(node)
    if value.part is not None:
        # The axis that has rows of its own keeps its place among those that are not one.
        kept = [i for i, n in enumerate(shape) if n != 1]
        place = [i for i, n in enumerate(value.shape) if n != 1].index(value.part[0])
        if tile(shape) == value.dims:
            return value._replace(shape=shape, part=(kept[place], *value.part[1:]))
    elif value.number is not None or tile(shape) == value.dims:
        return value._replace(shape=shape)
    raise Untranslatable(f"{node.target} of {value.shape} to {shape} moves numbers between axes")


def _expand(body: Body, node: Node) -> Value:
    return body._reshaped(node, body.argument(node, 0))


def _permute(body: Body, node: Node) -> Value:
    value, shape = body.argument(node, 0), shape_of(node)
    rank = len(value.shape)
    order = list(range(rank))
    if str(node.target).startswith("aten.permute"):
        order = [i % rank for i in cast("list[int]", node.args[1])]
    else:
        i, j = (x % rank for x in cast("tuple[int, int]", node.args[1:] or (0, 1)))
        order[i], order[j] = order[j], order[i]
    moved = [i for i in order if value.shape[i] != 1]
    if value.number is not None or moved == sorted(moved):
        return value._replace(shape=shape)
    places = [sorted(moved).index(i) for i in moved]
    if len(places) > 2:
        return body.line(node, f"tl.permute({value.text}, {places})")
    if value.text in body.turned:
        return Value(body.turned[value.text], shape)
    turned = body.line(node, f"tl.trans({value.text})")
    body.turned[turned.text] = value.text
    return turned


def _fill(body: Body, node: Node) -> Value:
    name, number = str(node.target).removeprefix("aten.").partition(".")[0], node.args[-1]
    if "ones" in name or "zeros" in name or name.startswith(("empty", "new_empty")):
        number = float("ones" in name)
    if isinstance(number, Node):
        return body._reshaped(node, body.values[number])
    wanted = node.meta["val"].dtype
    number = bool(number) if not wanted.is_floating_point else float(cast(float, number))
    return Value("", shape_of(node), number)


def _copy(body: Body, node: Node) -> Value:
    value = body.values[cast(Node, node.args[0])]
    require_exact(cast(Node, node.args[0]).meta["val"].dtype, node.meta["val"].dtype)
    after = node.meta["val"].dtype.is_floating_point
    if value.number is not None:
        return value._replace(number=float(value.number) if after else bool(value.number))
    if cast(Node, node.args[0]).meta["val"].dtype.is_floating_point == after:
        return value
    return body.line(node, f"{value.text}.to({body.dtype if after else 'tl.int1'})")


def _reduction(function: str) -> Rule:
    def rule(body: Body, node: Node) -> Value:
        value = body.argument(node, 0)
        given = node.args[1] if len(node.args) > 1 else None
        rank = len(value.shape)
        axes = [i % rank for i in cast("list[int]", given)] if given else list(range(rank))
        kept = [i for i, n in enumerate(value.shape) if n != 1]
        count = math.prod(value.shape[i] for i in axes)
        places = sorted((kept.index(i) for i in axes if i in kept), reverse=True)
        if value.number is not None:
            number = value.number * count if function == "sum" else value.number
            return value._replace(shape=shape_of(node), number=float(number))
        if not places:
            return value._replace(shape=shape_of(node))
        text = value.text
        for place in places:
            text = f"tl.{'sum' if function == 'mean' else function}({text}, {place})"
        return body.line(node, f"{text} / {float(count)}" if function == "mean" else text)

    return rule


def _along(function: str) -> Rule:
    """Cumulative sums and reversals, along one axis."""

    def rule(body: Body, node: Node) -> Value:
        value, axis = body.argument(node, 0), node.args[1]
        (axis,) = axis if isinstance(axis, (list, tuple)) else (axis,)
        axis = cast(int, axis) % len(value.shape)
        if value.shape[axis] == 1 or (value.number is not None and function == "flip"):
            return value._replace(shape=shape_of(node))
        place = [i for i, n in enumerate(value.shape) if n != 1].index(axis)
        return body.line(node, f"tl.{function}({body.whole(value)}, {place})")

    return rule


def _triangle(sign: str) -> Rule:
    def rule(body: Body, node: Node) -> Value:
        value, shape = body.argument(node, 0), shape_of(node)
        diagonal = cast(int, node.args[1]) if len(node.args) > 1 else 0
        rows, columns = (arange(shape, len(shape) + i) if shape[i] != 1 else "0" for i in (-2, -1))
        kept = diagonal <= 0 if sign == ">=" else diagonal >= 0
        if shape[-2:] == (1, 1):
            return value if kept else Value("", shape, False if isinstance(value.number, bool) else 0.0)
        mask = f"{columns} - {rows} {sign} {diagonal}"
        if value.number is True:
            return body.line(node, mask)
        if node.meta["val"].dtype.is_floating_point:
            return body.line(node, f"tl.where({mask}, {body.whole(value)}, 0.0)")
        return body.line(node, f"({mask}) & {body.whole(value)}")

    return rule


def _rows(size: int, start: Any, stop: Any) -> tuple[int, int]:
    """A slice's own borders."""
    begin, end, _ = slice(start, stop).indices(size)
    return begin, end


def _select(body: Body, node: Node) -> Value:
    axis, index = (cast(int, x) for x in node.args[1:3])
    return _picked(body, node, axis, index)


def _picked(body: Body, node: Node, axis: int, index: int) -> Value:
    """One row along an axis, as the sum over a mask."""
    value = body.argument(node, 0)
    axis, index = axis % len(value.shape), index % value.shape[axis]
    if value.number is not None or value.shape[axis] == 1:
        return value._replace(shape=shape_of(node))
    place = [i for i, n in enumerate(value.shape) if n != 1].index(axis)
    return body.line(node, f"tl.sum(tl.where({arange(value.shape, axis)} == {index}, {value.text}, 0.0), {place})")


def _slice(body: Body, node: Node) -> Value:
    value = body.argument(node, 0)
    axis, start, stop = (*cast("tuple[int, ...]", node.args[1:4]), *(0, None, None)[len(node.args) - 1 :])[:3]
    axis = cast(int, axis) % len(value.shape)
    begin, end = _rows(value.shape[axis], start, stop)
    if len(node.args) > 4 and node.args[4] != 1:
        raise Untranslatable(f"{node.target} with a step of {node.args[4]}")
    if value.number is not None or end - begin == value.shape[axis]:
        return value._replace(shape=shape_of(node))
    if end - begin == 1:
        return _picked(body, node, axis, begin)
    return Value(value.text, shape_of(node), None, (axis, begin, end))


def _placed(body: Body, node: Node) -> Value:
    """The gradient of a slice or of one row: its numbers there, 0 elsewhere."""
    value = body.values[cast(Node, node.args[0])]
    shape, axis, start = shape_of(node), cast(int, node.args[2]) % len(shape_of(node)), cast(int, node.args[3])
    if "select" in str(node.target):
        start %= shape[axis]
        value = value._replace(shape=(*value.shape[:axis], 1, *value.shape[axis:]))
        stop = start + 1
    else:
        start, stop = _rows(shape[axis], start, node.args[4])
    if value.number == 0 or stop - start == shape[axis]:
        return value._replace(shape=shape)
    index = arange(shape, axis)
    if value.part is not None and value.part == (axis, start, stop):
        return body.line(node, f"tl.where(({index} >= {start}) & ({index} < {stop}), {value.text}, 0.0)")
    if value.part is not None or (stop - start > 1 and value.number is None):
        raise Untranslatable(f"{node.target} of rows that do not lie where they are put")
    text = spread(value.text, value.shape, shape) if value.number is None else filled(value.number, tile(shape), body.dtype)
    return body.line(node, f"tl.where(({index} >= {start}) & ({index} < {stop}), {text}, 0.0)")


def _scattered(body: Body, node: Node) -> Value:
    """A tile with one row replaced."""
    value, row, shape = body.argument(node, 0), body.argument(node, 1), shape_of(node)
    axis = cast(int, node.args[2]) % len(shape)
    row = row._replace(shape=(*row.shape[:axis], 1, *row.shape[axis:]))
    if shape[axis] == 1:
        return row._replace(shape=shape)
    mask = f"{arange(shape, axis)} == {cast(int, node.args[3]) % shape[axis]}"
    text = spread(row.text, row.shape, shape) if row.number is None else literal(row.number)
    return body.line(node, f"tl.where({mask}, {text}, {body.whole(value)})")


def _joined(body: Body, node: Node) -> Value:
    """Pieces end to end: single rows, numbers, and parts of tiles that already lie where they go."""
    values = [body.values[x] for x in cast("list[Node]", node.args[0])]
    shape = shape_of(node)
    axis = (cast(int, node.args[1]) if len(node.args) > 1 else 0) % len(shape)
    if len(values) == 1:
        return values[0]._replace(shape=shape)
    pieces: list[tuple[int, str]] = []
    start = 0
    for value in values:
        size = value.shape[axis]
        lies = value.part == (axis, start, start + size)
        if value.number is None and not lies and (size != 1 or value.part is not None):
            raise Untranslatable(f"{node.target} of rows that do not lie where they are put")
        pieces.append((start, body.whole(value, shape) if not lies else value.text))
        start += size
    text = pieces[-1][1]
    for (stop, _), (_, piece) in zip(reversed(pieces[1:]), reversed(pieces[:-1]), strict=True):
        text = f"tl.where({arange(shape, axis)} < {stop}, {piece}, {text})"
    return body.line(node, text)


def _stack(body: Body, node: Node) -> Value:
    values = [body.values[x] for x in cast("list[Node]", node.args[0])]
    if len(values) > 1:
        raise Untranslatable(f"{node.target} of {len(values)} tensors")
    return values[0]._replace(shape=shape_of(node))


def _product(body: Body, node: Node) -> Value:
    """a b for a [(1), m, k] and b [(1), k, n]."""
    a, b = body.argument(node, 0), body.argument(node, 1)
    if a.shape[:-2] not in ((), (1,)):
        raise Untranslatable(f"{node.target} of a batch of {a.shape[0]} matrices")
    m, k, n = *a.shape[-2:], b.shape[-1]
    if 0 in (a.number, b.number):
        return Value("", shape_of(node), 0.0)
    x, y = body.whole(a), body.whole(b)
    if min(m, k, n) >= MIN_DOT:
        x, y = (OPERANDS[body.operands].format(text) for text in (x, y))
        precision = PRECISIONS.get(body.operands, "")
        if MIN_ROWS <= m < n:
            return body.line(node, f"tl.trans(tl.dot(tl.trans({y}), tl.trans({x}){precision}))")
        return body.line(node, f"tl.dot({x}, {y}{precision})")
    if k == 1:
        return body.line(node, f"{spread(x, (m, 1), (m, n))} * {spread(y, (1, n), (m, n))}")
    if m * k * n > MAX_TILE:
        raise Untranslatable(f"a product of {m} x {k} and {k} x {n}: widths under {MIN_DOT} are summed in one tile")
    terms = f"{spread(x, (m, k, 1), (m, k, n))} * {spread(y, (1, k, n), (m, k, n))}"
    return body.line(node, f"tl.sum({terms}, {int(m > 1)})")


RULES: dict[str, Rule] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "squeeze", "unsqueeze", "alias", "detach"), _view),
    **dict.fromkeys(("lift_fresh_copy", "clone", "_to_copy", "convert_element_type"), _copy),
    **dict.fromkeys(("transpose", "permute", "t"), _permute),
    **dict.fromkeys(("ones", "zeros", "full", "scalar_tensor", "fill", "empty"), _fill),
    **dict.fromkeys(("ones_like", "zeros_like", "full_like", "empty_like"), _fill),
    **dict.fromkeys(("new_ones", "new_zeros", "new_full", "new_empty"), _fill),
    **dict.fromkeys(("bmm", "mm"), _product),
    **dict.fromkeys(("select_backward", "slice_backward"), _placed),
    "expand": _expand,
    "sum": _reduction("sum"),
    "mean": _reduction("mean"),
    "amax": _reduction("max"),
    "amin": _reduction("min"),
    "cumsum": _along("cumsum"),
    "flip": _along("flip"),
    "triu": _triangle(">="),
    "tril": _triangle("<="),
    "select": _select,
    "select_scatter": _scattered,
    "slice": _slice,
    "cat": _joined,
    "stack": _stack,
}
"""Operations that are more than number by number."""
