"""Loops, matrix products and running sums over buffers as the statements of a C++ program.

turned       every matrix that is only read as a transpose is made to be that one
schedule     which loops run as one: those over the same numbers, none of which reads what another one turns or sums
write        their text; what stands between statements lies in one arena, whose places are used again
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Text = Callable[..., str]


@dataclass(eq=False)
class Buffer:
    """Numbers by rows: those of the program's arguments at the pointer `name`, others where `write` puts them."""

    shape: tuple[int, ...]
    name: str = ""


class Ref(NamedTuple):
    """Some of a buffer's numbers, in a shape of their own."""

    buffer: Buffer
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @property
    def whole(self) -> bool:
        """Whether these are all of its numbers, in their order."""
        return _layout(self) == _layout(whole(self.buffer))

    def at(self, index: Sequence[str]) -> str:
        """The number at an index along the axes that are not of one."""
        strides = [s for s, n in zip(self.strides, self.shape, strict=True) if n != 1]
        terms = [i if s == 1 else f"{i} * {s}" for i, s in zip(index, strides, strict=True) if s != 0]
        return f"{self.buffer.name}[{' + '.join([*terms, *([str(self.offset)] if self.offset or not terms else [])])}]"


Operand = Ref | float
"""What an operation reads: numbers, or one number for all of them."""


@dataclass(eq=False)
class Loop:
    """A number for each index of `shape`, or with `reduce` their sum ("+") or largest or smallest along `axes`.

    `text` makes the number's expression of its operands'; if `indexed`, of the indices i0, i1, ... too.
    """

    out: Buffer
    shape: tuple[int, ...]
    operands: tuple[Operand, ...]
    text: Text
    reduce: str = ""
    axes: tuple[int, ...] = ()
    indexed: bool = False


@dataclass(eq=False)
class Product:
    """out [M, N] = a [M, K] b [K, N] for its operands a and b."""

    out: Buffer
    operands: tuple[Ref, ...]


@dataclass(eq=False)
class Running:
    """Sums of all numbers so far along one axis of its operand."""

    out: Buffer
    operands: tuple[Ref, ...]
    axis: int


Operation = Loop | Product | Running
Statement = list[Loop] | Product | Running
"""Loops that run as one, or something else."""


def whole(buffer: Buffer) -> Ref:
    """All of a buffer."""
    strides = itertools.accumulate(reversed(buffer.shape[1:]), int.__mul__, initial=1)
    return Ref(buffer, buffer.shape, tuple(reversed(list(strides))) if buffer.shape else ())


def tile(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without its axes of one."""
    return tuple(n for n in shape if n != 1)


def literal(number: float) -> str:
    """A number in C++."""
    if math.isnan(number):
        return "std::numeric_limits<real>::quiet_NaN()"
    if math.isinf(number):
        return f"{'-' if number < 0 else ''}std::numeric_limits<real>::infinity()"
    return f"real({number!r})"


def turned(operations: Sequence[Operation], results: Sequence[Operand]) -> list[Operand]:
    """The results, where all matrices that are only read as transposes have been made to be those."""
    results = list(results)
    # Consumers first, whose own turning makes a transpose of what they read, or none.
    for op in reversed(operations):
        axes = [axis for axis, n in enumerate(op.out.shape) if n != 1]
        if isinstance(op, Running) or (isinstance(op, Loop) and (op.reduce or op.indexed)) or len(axes) != 2:
            continue
        rows, columns = (op.out.shape[axis] for axis in axes)
        reads = [x for other in operations for x in other.operands] + results
        layouts = [_layout(x) for x in reads if isinstance(x, Ref) and x.buffer is op.out]
        if not layouts or any(x != [(0, 0), (1, columns), (columns, rows)] for x in layouts):
            continue
        _turn(op, axes)

        def turn(x: Any, out: Buffer = op.out, rows: int = rows) -> Any:
            if not isinstance(x, Ref) or x.buffer is not out:
                return x
            return x._replace(strides=tuple(rows if s == 1 else 1 for s in x.strides))

        for other in operations:
            other.operands = tuple(turn(x) for x in other.operands)
        results = [turn(x) for x in results]
    return results


def _turn(op: Loop | Product, axes: Sequence[int]) -> None:
    """Make of an operation the one that gives the transpose of its result along two axes."""
    i, j = axes

    def swapped(x: Sequence[int]) -> tuple[int, ...]:
        return tuple(x[{i: j, j: i}.get(axis, axis)] for axis in range(len(x)))

    def transposed(x: Ref) -> Ref:
        return x._replace(shape=swapped(x.shape), strides=swapped(x.strides))

    op.out.shape = swapped(op.out.shape)
    if isinstance(op, Product):
        op.operands = tuple(transposed(x) for x in reversed(op.operands))
    else:
        op.shape = swapped(op.shape)
        op.operands = tuple(transposed(x) if isinstance(x, Ref) else x for x in op.operands)


def _layout(x: Ref) -> list[tuple[int, int]]:
    """Its offset (and 0), then strides and lengths of the axes that are not of one."""
    return [(x.offset, 0), *((s, n) for s, n in zip(x.strides, x.shape, strict=True) if n != 1)]


def schedule(operations: Sequence[Operation], results: Sequence[Buffer]) -> list[Statement]:
    """An order of what the results need, in which loops are held back until something else needs them."""
    maker = {op.out: op for op in operations}
    needed: set[Operation] = set()
    stack = [maker[x] for x in results if x in maker]
    while stack:
        op = stack.pop()
        if op not in needed:
            needed.add(op)
            stack += [maker[x.buffer] for x in op.operands if isinstance(x, Ref) and x.buffer in maker]
    waiting: dict[Loop, None] = {}
    done: list[Statement] = []

    def sources(op: Operation) -> list[tuple[Loop, bool]]:
        """Loops that it waits for, and whether they can run as one with it."""
        found: list[tuple[Loop, bool]] = []
        for x in op.operands:
            source = maker.get(x.buffer) if isinstance(x, Ref) else None
            if isinstance(source, Loop) and source in waiting:
                assert isinstance(x, Ref)
                found.append((source, isinstance(op, Loop) and aligned(source, op, x)))
        return found

    def closure(op: Loop) -> tuple[set[Loop], Loop | None]:
        """What runs with a loop, or one that has to run before."""
        members, stack = set[Loop](), [op]
        while stack:
            member = stack.pop()
            members.add(member)
            for source, joins in sources(member):
                if not joins:
                    return members, source
                stack += [source] if source not in members else []
        return members, None

    def run(op: Loop) -> None:
        while (found := closure(op))[1] is not None:
            run(found[1])
        members = found[0]
        for other in waiting:
            if tile(other.shape) == tile(op.shape) and all(joins and x in members for x, joins in sources(other)):
                members.add(other)
        done.append([x for x in waiting if x in members])
        for member in members:
            del waiting[member]

    for op in operations:
        if op not in needed:
            continue
        if isinstance(op, Loop):
            waiting[op] = None
            continue
        while found := sources(op):
            run(found[0][0])
        done.append(op)
    while waiting:
        run(next(reversed(waiting)))
    return done


def aligned(source: Loop, op: Loop, x: Ref) -> bool:
    """Whether `op` reads of `source` the very number that it gives at the same index."""
    return not source.reduce and tile(source.shape) == tile(op.shape) and x.whole


def write(statements: Sequence[Statement], outer: set[Buffer], align: int) -> tuple[list[str], int]:
    """The lines of statements, and how many numbers of an arena at the pointer `arena` they need.

    `outer` buffers have pointers of their own; a loop's result that only loops that run with it read is never stored.
    """
    first, last = _lives(statements)
    inner = [x for x in first if x not in outer and (last[x] > first[x] or not isinstance(statements[first[x]], list))]
    places, size = _places(inner, first, last, align)
    for number, buffer in enumerate(inner):
        buffer.name = f"b{number}"
    lines = [f"real *{x.name} = arena + {places[x]};" for x in inner]
    stored = {*inner, *outer}
    for statement in statements:
        if isinstance(statement, list):
            lines += _loops(statement, stored)
        elif isinstance(statement, Product):
            a, b = statement.operands
            sizes = [*a.shape, b.shape[1]]
            numbers = [sizes[0], sizes[2], sizes[1], *a.strides, *b.strides]
            where = [f"{x.buffer.name} + {x.offset}" for x in (a, b)]
            lines.append(f"product<{', '.join(map(str, numbers))}>({', '.join(where)}, {statement.out.name});")
        else:
            lines += _sums(statement)
    return lines, size


def _lives(statements: Sequence[Statement]) -> tuple[dict[Buffer, int], dict[Buffer, int]]:
    """The statement that makes each buffer, and the last that reads it."""
    first: dict[Buffer, int] = {}
    last: dict[Buffer, int] = {}
    for i, statement in enumerate(statements):
        for op in statement if isinstance(statement, list) else [statement]:
            first.setdefault(op.out, i)
            last |= {x.buffer: i for x in op.operands if isinstance(x, Ref)}
    return first, last


def _places(
    buffers: Sequence[Buffer], first: dict[Buffer, int], last: dict[Buffer, int], align: int
) -> tuple[dict[Buffer, int], int]:
    """Where buffers lie, none over another that is still to be read."""
    places: dict[Buffer, int] = {}
    size = 0
    for buffer in buffers:
        count = -(-math.prod(buffer.shape) // align) * align
        busy = sorted(
            (places[x], places[x] + -(-math.prod(x.shape) // align) * align)
            for x in places
            if last[x] >= first[buffer] and first[x] <= last[buffer]
        )
        start = 0
        for begin, end in busy:
            if begin - start >= count:
                break
            start = max(start, end)
        places[buffer] = start
        size = max(size, start + count)
    return places, size


@dataclass
class _Nest:
    """Loops that run as one: the lines of the innermost, and per axis what stands before and after the loop of it."""

    dims: tuple[int, ...]
    stored: set[Buffer]
    body: list[str] = field(default_factory=list)
    local: dict[Buffer, str] = field(default_factory=dict)
    before: dict[int, list[str]] = field(default_factory=dict)
    after: dict[int, list[str]] = field(default_factory=dict)
    summed: list[str] = field(default_factory=list)
    parallel: bool = True

    def add(self, op: Loop) -> None:
        index = [f"i{axis}" for axis in range(len(self.dims))]
        name = f"x{len(self.body)}"
        texts = [self.local.get(x.buffer) or x.at(index) if isinstance(x, Ref) else literal(x) for x in op.operands]
        self.body.append(f"real {name} = {op.text(*texts)};")
        if op.reduce:
            self._reduce(op, name, index)
            return
        self.local[op.out] = name
        if op.out in self.stored:
            self.body.append(f"{whole(op.out).at(index)} = {name};")

    def _reduce(self, op: Loop, name: str, index: Sequence[str]) -> None:
        kept = [i for i, axis in enumerate(a for a, n in enumerate(op.shape) if n != 1) if axis not in op.axes]
        target, depth = whole(op.out).at([index[i] for i in kept]), len(kept)
        start = {"+": "0", "max": literal(-math.inf), "min": literal(math.inf)}[op.reduce]
        total = f"s{name}" if kept == list(range(depth)) else target
        self.body.append(f"{total} = {f'{total} + {name}' if op.reduce == '+' else f'{op.reduce}_({name}, {total})'};")
        if total == target:
            # Sums along outer axes lie in memory, and may be in the way of one another if the innermost is another.
            count = math.prod(op.out.shape)
            self.before.setdefault(0, []).append(f"for (int i = 0; i < {count}; i++) {op.out.name}[i] = {start};")
            self.parallel = self.parallel and len(self.dims) - 1 in kept
        else:
            self.before.setdefault(depth, []).append(f"real {total} = {start};")
            self.after.setdefault(depth, []).append(f"{target} = {total};")
            self.summed.append(f"reduction({op.reduce} : {total})")

    def lines(self) -> list[str]:
        found = ["{"]
        for axis, count in enumerate(self.dims):
            found += self.before.get(axis, [])
            if axis == len(self.dims) - 1 and self.parallel:
                found.append(" ".join(["#pragma omp simd", *self.summed]))
            found.append(f"for (int i{axis} = 0; i{axis} < {count}; i{axis}++) {{")
        found += self.body
        for axis in reversed(range(len(self.dims))):
            found += ["}", *self.after.get(axis, [])]
        return [*found, "}"]


def _loops(members: Sequence[Loop], stored: set[Buffer]) -> list[str]:
    nest = _Nest(tile(members[0].shape), stored)
    for op in members:
        nest.add(op)
    return nest.lines()


def _sums(op: Running) -> list[str]:
    """Running sums, along one axis."""
    (x,) = op.operands
    dims = x.shape
    index = [f"i{a}" for a in range(len(dims))]
    strides = whole(op.out).strides
    here = " + ".join(f"{i} * {s}" for i, s in zip(index, strides, strict=True))
    there = " + ".join([*(f"{i} * {s}" for i, s in zip(index, x.strides, strict=True)), str(x.offset)])
    lines = [f"for (int i{a} = 0; i{a} < {n}; i{a}++)" for a, n in enumerate(dims)]
    sum_ = f"(i{op.axis} > 0 ? {op.out.name}[{here} - {strides[op.axis]}] : real(0))"
    return [*lines, f"    {op.out.name}[{here}] = {sum_} + {x.buffer.name}[{there}];"]
