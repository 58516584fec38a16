"""A reader of the formulas that choices give as text, so that they can be compared with the choices' tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TOKEN = re.compile(r"\s*(\d+(?:\.\d+)?|[A-Za-z]\w*(?:\{[^}]*\})?|\|\||<=|[-+*/^()|<>,])")

FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "sinh": torch.sinh,
    "cosh": torch.cosh,
    "sign": torch.sign,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "elu": F.elu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "max": torch.maximum,
    "min": torch.minimum,
    "LN": lambda x: F.layer_norm(x, x.shape[-1:], eps=1e-5),
    "RMS": lambda x: F.rms_norm(x, x.shape[-1:], eps=1e-5),
    "mean": lambda x: x.mean((-2, -1), keepdim=True),
    "mean_in": lambda x: x.mean(-2, keepdim=True),
}


def evaluate(
    text: str,
    names: Mapping[str, Any],
    axes: tuple[int, ...] = (-1,),
    weights: tuple[str, ...] = (),
    functions: Mapping[str, Callable[..., Tensor]] | None = None,
) -> Tensor:
    """The value of a formula, `sum` and ||x|| being over `axes`, and products with `weights` matrix products."""
    reader = _Reader(text, names, axes, weights, {**FUNCTIONS, **(functions or {})})
    value = reader.condition()
    assert reader.peek() == "", f"{text!r} goes on with {reader.tokens[reader.place :]}"
    return value


class _Reader:
    """Recursive descent; a product is written side by side, and binds as / does, from the left."""

    def __init__(self, text: str, names: Any, axes: Any, weights: Any, functions: Any) -> None:
        self.names, self.axes, self.weights, self.functions = names, axes, weights, functions
        self.tokens = TOKEN.findall(text)
        assert "".join(self.tokens) == re.sub(r"\s", "", text), f"{text!r} is no formula"
        self.place, self.bars = 0, []

    def peek(self) -> str:
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def take(self, token: str | None = None) -> str:
        found = self.peek()
        assert token in (None, found), f"{token!r} expected, not {found!r}"
        self.place += 1
        return found

    def condition(self) -> Tensor:
        value = self.total()
        if self.peek() != "if":
            return value
        self.take("if")
        left = self.total()
        self.take("<=")
        holds = left <= self.total()
        self.take("else")
        return torch.where(holds, value, self.condition())

    def total(self) -> Tensor:
        value = self.product()
        while self.peek() in ("+", "-"):
            value = value + self.product() if self.take() == "+" else value - self.product()
        return value

    def product(self) -> Tensor:
        if self.peek() == "-":
            self.take()
            return -self.product()
        value = self.power()
        while self.peek() in ("*", "/") or self.factor_follows():
            sign = self.take() if self.peek() in ("*", "/") else ""
            name = self.peek()
            factor = self.power()
            if sign == "/":
                value = value / factor
            else:
                value = value @ factor if name in self.weights and sign == "" else value * factor
        return value

    def factor_follows(self) -> bool:
        token = self.peek()
        if token in ("|", "||"):
            return token not in self.bars[-1:]
        return token == "(" or (token[:1].isalnum() and token not in ("if", "else"))

    def power(self) -> Tensor:
        value = self.primary()
        if self.peek() == "^":
            self.take()
            value = value ** self.primary()
        return value

    def primary(self) -> Tensor:
        token = self.take()
        if token[0].isdigit():
            return torch.tensor(float(token), dtype=torch.float64)
        if token == "(":
            value = self.condition()
            self.take(")")
            return value
        if token in ("|", "||"):
            self.bars.append(token)
            value = self.total()
            self.take(token)
            self.bars.pop()
            return value.abs() if token == "|" else value.square().sum(self.axes, keepdim=True).sqrt()
        if token == "<":
            left = self.total()
            self.take(",")
            value = (left * self.total()).sum(self.axes, keepdim=True)
            self.take(">")
            return value
        if token in ("sum", "sum_in"):
            return self.product().sum(self.axes if token == "sum" else -2, keepdim=True)
        return self.call(token) if token in self.functions else self.names[token]

    def call(self, name: str) -> Tensor:
        self.take("(")
        arguments = [self.total()]
        while self.peek() == ",":
            self.take()
            arguments.append(self.total())
        self.take(")")
        return self.functions[name](*arguments)
