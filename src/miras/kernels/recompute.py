"""What loops make again where they read it, since that is less to fetch than what another one has stored."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace

from miras.kernels.loops import Buffer, Loop, Ref, Statement, aligned

OUT_OF_REACH = 2**13
"""Numbers of a matrix that is no longer in the cache next to the core when it is read again."""


def recomputed(statements: Sequence[Statement], results: Sequence[Buffer]) -> list[Statement]:
    """The same, where loops that would read many matrices do again the little that makes these of fewer ones."""
    made: dict[Buffer, Loop] = {}
    found: list[Statement] = []
    for statement in statements:
        if isinstance(statement, list):
            statement = _with_copies(statement, made)
            made |= {op.out: op for op in statement if not op.reduce and _cheap(op)}
        found.append(statement)
    return _needed(found, results)


def _needed(statements: Sequence[Statement], results: Sequence[Buffer]) -> list[Statement]:
    """Without loops whose numbers nothing reads any more."""
    read, found = set(results), list[Statement]()
    for statement in reversed(statements):
        if isinstance(statement, list):
            kept = list[Loop]()
            for op in reversed(statement):
                if op.out in read:
                    kept.insert(0, op)
                    read |= {x.buffer for x in op.operands if isinstance(x, Ref)}
            statement = kept
        else:
            read |= {x.buffer for x in statement.operands}
        found.insert(0, statement)
    return [x for x in found if x != []]


def _cheap(op: Loop) -> bool:
    """Whether its numbers are sums, products or the like, of no division, root or function."""
    if op.indexed:
        return False
    text = op.text(*"x" * len(op.operands))
    return not re.search(r"/|exp_|log_|erf_|tanh_|pow_|sin_|cos_|sqrt_", text)


def _with_copies(members: list[Loop], made: dict[Buffer, Loop]) -> list[Loop]:
    """Loops that run as one, with copies of those among `made` that they read, if they then read fewer matrices."""
    if math.prod(members[0].shape) < OUT_OF_REACH:
        return members
    inside = {op.out for op in members}
    copies: dict[Buffer, Loop] = {}
    order: list[Loop] = []

    def copied(op: Loop) -> Loop:
        operands = list(op.operands)
        for i, x in enumerate(operands):
            if not isinstance(x, Ref) or x.buffer in inside or x.buffer not in made or not aligned(made[x.buffer], op, x):
                continue
            if x.buffer not in copies:
                copies[x.buffer] = copied(replace(made[x.buffer], out=Buffer(x.buffer.shape)))
                order.append(copies[x.buffer])
            operands[i] = x._replace(buffer=copies[x.buffer].out)
        return replace(op, operands=tuple(operands))

    changed = [copied(op) for op in members]
    return order + changed if _read(order + changed) < _read(members) else members


def _read(members: Sequence[Loop]) -> int:
    """How many buffers of as many numbers as they have indices loops read that run as one."""
    inside, count = {op.out for op in members}, math.prod(members[0].shape)
    refs = [x for op in members for x in op.operands if isinstance(x, Ref) and x.buffer not in inside]
    return len({x.buffer for x in refs if math.prod(x.buffer.shape) >= count})
