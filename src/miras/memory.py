"""Choice (i), the memory: what maps keys to values, and the fast weights it does it with.

A memory's forward pass is written once, against a `linear(name, x)` that it is handed. Handed the plain product
x @ W[name] it predicts; handed a recording one it yields the rank-one factors of every gradient; handed the masked
read-out it reads a whole block. A deep memory is therefore a stack of gated linear attentions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from miras.choice import Choice, require, require_one_of

Linear = Callable[[str, Tensor], Tensor]

NORM_EPS = 1e-5

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


class WeightShape(NamedTuple):
    """Shape of a fast weight used as x @ W, and the axis on which per-channel gates act (None: it has none)."""

    d_in: int
    d_out: int
    channel_axis: int | None


@dataclass(frozen=True)
class Memory(Choice, abstract=True):
    """An architecture M(W; x) of fast weights.

    Facts: `linear` means that M is x @ W with a single weight, so that predictions are linear in W. Its `symbols` are
    M in terms of x and its weights, "x W" being a matrix product and "*" one by coordinates.
    """

    family: ClassVar[str] = "memory"
    linear: ClassVar[bool] = False

    def weights(self, key_dim: int, value_dim: int) -> dict[str, WeightShape]:
        """Names and shapes of the fast weights for keys of `key_dim` and values of `value_dim`."""
        raise NotImplementedError

    @property
    def offsets(self) -> tuple[str, ...]:
        """Names of the fast weights that are added and not multiplied by; a layer starts them at zero."""
        return ()

    def slow(self, value_dim: int) -> dict[str, float]:
        """Names of the optional slow parameters (each of shape [H, value_dim]) and their neutral values."""
        return {}

    def __call__(self, x: Tensor, linear: Linear, slow: Mapping[str, Tensor]) -> Tensor:
        """Map x [..., K] to predictions [..., V], every product with a fast weight going through `linear`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Matrix(Memory):
    """Matrix memory: M(W; x) = x @ W, one weight "W" of shape (K, V)."""

    linear: ClassVar[bool] = True

    def weights(self, key_dim: int, value_dim: int) -> dict[str, WeightShape]:
        return {"W": WeightShape(key_dim, value_dim, 0)}

    @property
    def symbols(self) -> str:
        return "x W"

    def __call__(self, x: Tensor, linear: Linear, slow: Mapping[str, Tensor]) -> Tensor:
        return linear("W", x)


@dataclass(frozen=True)
class Vector(Memory):
    """Vector memory: M(w; x) = x * w, one weight "w" of shape (1, K), needs K == V (an element-wise linear RNN)."""

    def weights(self, key_dim: int, value_dim: int) -> dict[str, WeightShape]:
        _require_square(self, key_dim, value_dim)
        return {"w": WeightShape(1, value_dim, 1)}

    @property
    def symbols(self) -> str:
        return "x * w"

    def __call__(self, x: Tensor, linear: Linear, slow: Mapping[str, Tensor]) -> Tensor:
        return x * linear("w", torch.ones_like(x[..., :1]))


@dataclass(frozen=True)
class MLP(Memory):
    """Deep memory: M(W; x) = x + LN(act(act(x @ up) @ hidden1 ...) @ down), hidden width expansion * V.

    `depth` counts the weights: 1 is x + LN(x @ up), 2 is up and down, 3 adds hidden1. LN has eps 1e-5 and no affine
    part unless the slow parameters "norm.weight" and "norm.bias" are given. `residual=False` drops the leading x,
    `norm=None` the normalisation ("layer" or "rms" otherwise). `fast_bias` adds a fast weight "up_bias", ... of shape
    (1, d_out) to every product. Source: Miras Sec. 5.3, Titans Sec. 3.1, TTT Sec. 2.7 (with fast biases).
    """

    depth: int = 2
    expansion: float = 4.0
    activation: str = "gelu"
    residual: bool = True
    norm: str | None = "layer"
    fast_bias: bool = False

    def __post_init__(self) -> None:
        require(self.depth >= 1, f"MLP depth={self.depth}; it counts the weight matrices and must be at least 1")
        require(self.expansion > 0, f"MLP expansion={self.expansion}; must be positive (hidden width / value width)")
        require_one_of("MLP activation", self.activation, tuple(ACTIVATIONS))
        require_one_of("MLP norm", self.norm, ("layer", "rms", None))

    def weights(self, key_dim: int, value_dim: int) -> dict[str, WeightShape]:
        if self.residual:
            _require_square(self, key_dim, value_dim)
        width = value_dim if self.depth == 1 else max(1, round(self.expansion * value_dim))
        shapes = {"up": WeightShape(key_dim, width, 0)}
        for name in self._names[1:-1]:
            shapes[name] = WeightShape(width, width, None)
        if self.depth > 1:
            shapes["down"] = WeightShape(width, value_dim, 1)
        last = self._names[-1]
        for name in self._names if self.fast_bias else ():
            d_out = shapes[name].d_out
            shapes[f"{name}_bias"] = WeightShape(1, d_out, 1 if name == last else None)
        return shapes

    @property
    def _names(self) -> tuple[str, ...]:
        hidden = [f"hidden{i}" for i in range(1, self.depth - 1)]
        return ("up",) if self.depth == 1 else ("up", *hidden, "down")

    @property
    def offsets(self) -> tuple[str, ...]:
        return tuple(f"{name}_bias" for name in self._names) if self.fast_bias else ()

    def slow(self, value_dim: int) -> dict[str, float]:
        if self.norm is None:
            return {}
        return {"norm.weight": 1.0, "norm.bias": 0.0}

    @property
    def symbols(self) -> str:
        added = "{0} + {0}_bias" if self.fast_bias else "{0}"
        y = f"x {added.format('up')}"
        for name in self._names[1:]:
            y = f"{self.activation}({y}) {added.format(name)}"
        y = {"layer": f"LN({y})", "rms": f"RMS({y})", None: y}[self.norm]
        return f"x + {y}" if self.residual else y

    def __call__(self, x: Tensor, linear: Linear, slow: Mapping[str, Tensor]) -> Tensor:
        act = ACTIVATIONS[self.activation]
        y = self._product("up", x, linear)
        for name in self._names[1:]:
            y = self._product(name, act(y), linear)
        if self.norm is not None:
            y = normalize(y, self.norm)
            if "norm.weight" in slow:
                y = y * slow["norm.weight"]
            if "norm.bias" in slow:
                y = y + slow["norm.bias"]
        return x + y if self.residual else y

    def _product(self, name: str, x: Tensor, linear: Linear) -> Tensor:
        y = linear(name, x)
        return y + linear(f"{name}_bias", torch.ones_like(x[..., :1])) if self.fast_bias else y


@dataclass(frozen=True)
class GatedMLP(Memory):
    """SwiGLU memory: M(W; x) = (silu(x @ gate) * (x @ up)) @ down, hidden width expansion * V.

    Source: Shazeer 2020 (SwiGLU); as fast weights: LaCT (arXiv 2505.23884).
    """

    expansion: float = 2.0

    def __post_init__(self) -> None:
        require(self.expansion > 0, f"GatedMLP expansion={self.expansion}; must be positive (hidden width / value width)")

    @property
    def symbols(self) -> str:
        return "(silu(x gate) * (x up)) down"

    def weights(self, key_dim: int, value_dim: int) -> dict[str, WeightShape]:
        width = max(1, round(self.expansion * value_dim))
        return {
            "gate": WeightShape(key_dim, width, 0),
            "up": WeightShape(key_dim, width, 0),
            "down": WeightShape(width, value_dim, 1),
        }

    def __call__(self, x: Tensor, linear: Linear, slow: Mapping[str, Tensor]) -> Tensor:
        return linear("down", F.silu(linear("gate", x)) * linear("up", x))


def normalize(y: Tensor, norm: str) -> Tensor:
    """Layer or root-mean-square normalisation over the last axis, without affine part, eps 1e-5."""
    if norm == "rms":
        return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + NORM_EPS)
    y = y - y.mean(-1, keepdim=True)
    return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + NORM_EPS)


def _require_square(memory: Memory, key_dim: int, value_dim: int) -> None:
    require(
        key_dim == value_dim,
        f"{memory.kind} adds or multiplies keys and values coordinate by coordinate: key width {key_dim} must equal "
        f"value width {value_dim} (an MLP with residual=False accepts any widths)",
    )
