"""Operations number by number, as expressions of Triton on the texts of their operands."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

MAX_POWER = 64
"""Factors of a product that stands for a power."""


class Untranslatable(ValueError):
    """An operation that has no line of Triton or C++ here, and why."""


def literal(number: float | bool) -> str:
    """A number as Triton reads it."""
    if isinstance(number, bool) or math.isfinite(number):
        return repr(number)
    return f'float("{number}")'


def power(x: str, exponent: float | bool | None) -> str:
    if exponent is None:
        raise Untranslatable("a power whose exponent is a tensor")
    if exponent == 0.5:
        return f"tl.sqrt({x})"
    if exponent == int(exponent) and exponent != 0:
        product = repeated(x, int(abs(exponent)))
        return product if exponent > 0 else f"1.0 / ({product})"
    return f"tl.exp2({literal(exponent)} * tl.log2({x}))"


def repeated(x: str, count: int) -> str:
    """x to a whole power. As a product: by a logarithm, numbers below 0 have none. Raises Untranslatable."""
    if count > MAX_POWER:
        raise Untranslatable(f"a power of {count}; products have at most {MAX_POWER} factors")
    return " * ".join([x] * count)


def _clamp(x: str, low: str = "None", high: str = "None") -> str:
    x = x if low == "None" else f"tl.maximum({x}, {low})"
    return x if high == "None" else f"tl.minimum({x}, {high})"


def _sign(x: str) -> str:
    return f"tl.where({x} > 0, 1.0, tl.where({x} < 0, -1.0, {x} * 0.0))"


POINTWISE: dict[str, Callable[..., str]] = {
    "add": lambda x, y: f"{x} + {y}",
    "sub": lambda x, y: f"{x} - {y}",
    "mul": lambda x, y: f"{x} * {y}",
    "div": lambda x, y: f"{x} / {y}",
    "pow": power,
    "neg": lambda x: f"-{x}",
    "reciprocal": lambda x: f"1.0 / {x}",
    "exp": lambda x: f"tl.exp({x})",
    "log": lambda x: f"tl.log({x})",
    "sqrt": lambda x: f"tl.sqrt({x})",
    "rsqrt": lambda x: f"1.0 / tl.sqrt({x})",
    "sin": lambda x: f"tl.sin({x})",
    "cos": lambda x: f"tl.cos({x})",
    "erf": lambda x: f"tl.erf({x})",
    "abs": lambda x: f"tl.abs({x})",
    "sigmoid": lambda x: f"1.0 / (1.0 + tl.exp(-{x}))",
    "tanh": lambda x: f"1.0 - 2.0 / (1.0 + tl.exp(2.0 * {x}))",
    "sinh": lambda x: f"0.5 * (tl.exp({x}) - tl.exp(-{x}))",
    "cosh": lambda x: f"0.5 * (tl.exp({x}) + tl.exp(-{x}))",
    "sign": _sign,
    "sgn": _sign,
    "maximum": lambda x, y: f"tl.maximum({x}, {y})",
    "minimum": lambda x, y: f"tl.minimum({x}, {y})",
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": lambda x, high: _clamp(x, "None", high),
    "softshrink_backward": lambda grad, x, width: f"tl.where(tl.abs({x}) > {width}, {grad}, 0.0)",
    "where": lambda mask, x, y: f"tl.where({mask}, {x}, {y})",
    "gt": lambda x, y: f"{x} > {y}",
    "ge": lambda x, y: f"{x} >= {y}",
    "lt": lambda x, y: f"{x} < {y}",
    "le": lambda x, y: f"{x} <= {y}",
    "eq": lambda x, y: f"{x} == {y}",
    "ne": lambda x, y: f"{x} != {y}",
    "logical_and": lambda x, y: f"{x} & {y}",
    "bitwise_and": lambda x, y: f"{x} & {y}",
    "logical_or": lambda x, y: f"{x} | {y}",
    "bitwise_or": lambda x, y: f"{x} | {y}",
    "logical_not": lambda x: f"{x} == 0",
    "bitwise_not": lambda x: f"{x} == 0",
}
"""Operations number by number."""


def require_exact(before: torch.dtype, after: torch.dtype) -> None:
    """That a cast changes no number but to a truth value: programs have one type of numbers. Raises Untranslatable."""
    if before.is_floating_point and after not in (before, torch.bool):
        raise Untranslatable(f"a cast of {before} to {after}, where programs have one type of numbers")


def folded(name: str, numbers: Sequence[float | bool | None]) -> int | float | None:
    """Which operand is an operation's result, or which number, where it needs no arithmetic; `numbers` are those known.

    A sum with 0, a product with 0 or 1, a choice by a known condition, a first power.
    """
    if name == "where" and numbers[0] is not None:
        return 1 if numbers[0] else 2
    if name == "add" and 0 in numbers[:2]:
        return 1 - numbers.index(0)
    if name == "pow" and numbers[1] == 0:
        return 1.0
    if name == "mul" and 0 in numbers:
        return 0.0
    if name == "mul" and 1 in numbers:
        return 1 - numbers.index(1)
    if (name == "sub" and numbers[1] == 0) or (name in ("div", "pow") and numbers[1] == 1):
        return 0
    if name in ("neg", "div") and numbers[0] == 0:
        return 0.0
    return None
