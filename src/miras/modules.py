"""The learned pieces that a memory layer is assembled from: short convolutions, gates, and initial fast weights.

Each knows its own initial values, `initial_values() -> {parameter name: tensor}`, whatever loads or resets the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miras.choice import require
from miras.inputs import GateMap
from miras.memory import Memory
from miras.packing import Packing
from miras.retention import Retention


class ShortConvolution(nn.Module):
    """Depthwise causal convolution over time: y_t = sum_{s < width} w_s * x_{t-s}, zero before the sequence.

    A sum of shifted products, so that packed sequences, and those that go on from a cached tail, give the same numbers.
    `weight` has nn.Conv1d's shape [channels, 1, width], the last one being the weight of x_t.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.channels, self.width = channels, width
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        reset(self)

    def initial_values(self) -> dict[str, Tensor]:
        bound = self.width**-0.5
        return {"weight": torch.empty(self.channels, 1, self.width).uniform_(-bound, bound)}

    def forward(
        self, x: Tensor, tail: Tensor | None = None, packing: Packing | None = None, keep: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, T, channels] -> (y [B, T, channels], next tail or None).

        `tail` [rows, width - 1, channels] holds the inputs before x, a row a sequence; the next is made if `keep`.
        """
        gap = self.width - 1
        weight = self.weight.squeeze(1).to(x.dtype)
        if packing is not None:
            tokens, front, back = packing.spread(gap, x.device)
            row = x.new_zeros(len(tokens) + len(front), self.channels).index_copy(0, tokens, x.squeeze(0))
            if tail is not None:
                row = row.index_copy(0, front, tail.to(x.dtype).flatten(0, 1))
            y = _CausalProducts.apply(row.unsqueeze(0), weight).squeeze(0).index_select(0, tokens).unsqueeze(0)
            return y, row.index_select(0, back).unflatten(0, (packing.num_sequences, gap)) if keep else None
        if tail is not None:
            x = torch.cat((tail.to(x.dtype), x), dim=1)
        y = _CausalProducts.apply(x, weight)
        y = y[:, gap:] if tail is not None else y
        return y, _last(x, gap) if keep else None

    def extra_repr(self) -> str:
        return f"{self.channels}, width={self.width}"


class GateProjection(nn.Module):
    """A rate, a decay or another gate: a `GateMap` of a linear projection of the hidden state, in float32 or float64.

    [B, T, hidden_size] -> [B, T * steps, H], or [B, T * steps, H, channels]. The projection has full rank unless the
    map gives one, and is left out where the map does not depend on the hidden state.
    """

    def __init__(self, gate: GateMap, hidden_size: int, num_heads: int, channels: int | None = None, steps: int = 1) -> None:
        super().__init__()
        self.gate, self.steps = gate, steps
        self.shape = (num_heads,) if channels is None else (num_heads, channels)
        width = steps * num_heads * (channels or 1)
        self.proj: nn.Module | None = None
        if gate.projected and gate.rank is not None:
            down, up = nn.Linear(hidden_size, gate.rank, bias=False), nn.Linear(gate.rank, width, bias=False)
            self.proj = nn.Sequential(down, up)
        elif gate.projected:
            self.proj = nn.Linear(hidden_size, width, bias=False)
        for name, value in self.initial_values().items():
            self.register_parameter(name, nn.Parameter(torch.empty(value.shape)))
        reset(self)
        mark_no_weight_decay(self)

    def initial_values(self) -> dict[str, Tensor]:
        return self.gate.parameters(self.shape)

    def forward(self, hidden_states: Tensor) -> Tensor:
        batch, num_tokens = hidden_states.shape[:2]
        shape = (batch, num_tokens * self.steps, *self.shape)
        x = None if self.proj is None else at_least_float32(self.proj(hidden_states)).view(shape)
        values = {name: at_least_float32(p) for name, p in self.named_parameters(recurse=False)}
        gate = self.gate(x, values)
        if x is None:
            dtype = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
            gate = gate.to(hidden_states.device, dtype).expand(shape)
        return gate


class FastWeights(nn.Module):
    """The learned initial dual state A_0 of a memory, [H, d_in, d_out] a weight, and its slow parameters [H, V].

    W_0 is drawn from N(0, std^2) and A_0 is unlink(W_0); where A holds logits, A_0 itself is drawn. `norm_gain` is the
    initial gain of the memory's own normalisation (None: no slow parameters). `weights()` gives them under the memory's
    own names; as parameters a dot in a name is an underscore.
    """

    def __init__(
        self,
        memory: Memory,
        retention: Retention,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        std: float,
        norm_gain: float | None,
    ) -> None:
        super().__init__()
        self.retention, self.std, self.norm_gain = retention, std, norm_gain
        self.shapes = {
            name: (num_heads, shape.d_in, shape.d_out) for name, shape in memory.weights(key_dim, value_dim).items()
        }
        slow = memory.slow(value_dim) if norm_gain is not None else {}
        self.slow = dict.fromkeys(slow, (num_heads, value_dim))
        for name, shape in {**self.shapes, **self.slow}.items():
            self.register_parameter(_escape(name), nn.Parameter(torch.empty(shape)))
        reset(self)
        mark_no_weight_decay(self)

    def initial_values(self) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for name, shape in self.shapes.items():
            drawn = self.std * torch.randn(shape)
            values[_escape(name)] = drawn if self.retention.logits else self.retention.unlink(drawn)
        for name, shape in self.slow.items():
            gain = self.norm_gain if name.endswith("weight") else None
            values[_escape(name)] = torch.full(shape, gain or 0.0)
        return values

    def weights(self) -> dict[str, Tensor]:
        """{the memory's name: parameter}."""
        return {name: getattr(self, _escape(name)) for name in (*self.shapes, *self.slow)}


class _CausalProducts(torch.autograd.Function):
    """y[:, t] = sum_s w[:, width-1-s] * x[:, t-s] for x [B, T, C], w [C, width]; sums in place, in both directions."""

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:  # type: ignore[override]
        y = x * w[:, -1]
        for shift in _shifts(x, w):
            y[:, shift:].addcmul_(x[:, :-shift], w[:, -1 - shift])
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], _: Tensor) -> None:  # type: ignore[override]
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, w = ctx.saved_tensors
        dx, dw = grad * w[:, -1], torch.zeros_like(w)
        dw[:, -1] = (grad * x).sum((0, 1))
        for shift in _shifts(x, w):
            dx[:, :-shift].addcmul_(grad[:, shift:], w[:, -1 - shift])
            dw[:, -1 - shift] = (grad[:, shift:] * x[:, :-shift]).sum((0, 1))
        return dx, dw


def _last(x: Tensor, count: int) -> Tensor:
    # A copy: a view would keep the whole prompt's activations alive in the cache.
    end = x[:, max(0, x.shape[1] - count) :].clone()
    return F.pad(end, (0, 0, count - end.shape[1], 0)) if end.shape[1] < count else end


def _shifts(x: Tensor, w: Tensor) -> Iterator[int]:
    return iter(range(1, min(w.shape[1], x.shape[1])))


def reset(module: nn.Module) -> None:
    """Give a module's own parameters their initial values (nothing on the meta device, which holds none)."""
    if all(p.is_meta for p in module.parameters(recurse=False)):
        return
    with torch.no_grad():
        for name, value in initial_values(module).items():
            module.get_parameter(name).copy_(value)


def initial_values(module: Any) -> dict[str, Tensor]:
    """A module's `initial_values`, drawn on the CPU whatever the default device is."""
    with torch.device("cpu"):
        return module.initial_values()


def mark_no_weight_decay(module: nn.Module) -> None:
    """Mark a module's own parameters, which must not decay towards zero, with `_no_weight_decay`."""
    for parameter in module.parameters(recurse=False):
        parameter._no_weight_decay = True  # type: ignore[attr-defined]


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is."""
    return x if x.dtype == torch.float64 else x.float()


def _escape(name: str) -> str:
    escaped = name.replace(".", "_")
    require(escaped.isidentifier(), f"fast weight {name!r} must be a name, with dots at most")
    return escaped
