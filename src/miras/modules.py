"""The learned pieces that a memory layer is assembled from: short convolutions, gates, and initial fast weights.

Each knows its own initial values, `initial_values() -> {parameter name: tensor}`, whatever loads or resets the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miras.choice import Gate, require, require_one_of
from miras.inputs import GATE_ACTIVATIONS, Features, GateMap, Output, Sigmoid, Softplus
from miras.memory import Memory
from miras.packing import Packing
from miras.retention import Retention


class ShortConvolution(nn.Module):
    """Depthwise causal convolution over time: y_t = sum_{s < width} w_s * x_{t-s} (+ bias), zero before the sequence.

    A sum of shifted products, so that packed sequences, and those that go on from a cached tail, give the same numbers.
    `weight` has nn.Conv1d's shape [channels, 1, width], the last one being the weight of x_t.
    """

    def __init__(self, channels: int, width: int, bias: bool = False) -> None:
        super().__init__()
        self.channels, self.width = channels, width
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        reset(self)

    def initial_values(self) -> dict[str, Tensor]:
        bound = self.width**-0.5
        values = {"weight": torch.empty(self.channels, 1, self.width).uniform_(-bound, bound)}
        return values if self.bias is None else {**values, "bias": torch.zeros(self.channels)}

    def forward(
        self, x: Tensor, tail: Tensor | None = None, packing: Packing | None = None, keep: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, T, channels] -> (y [B, T, channels], next tail or None).

        `tail` [rows, width - 1, channels] holds the inputs before x, a row a sequence; the next is made if `keep`.
        """
        weight = self.weight.squeeze(1).to(x.dtype)
        y, tail = over_past(lambda row: _causal_products(row, weight), x, self.width - 1, tail, packing, keep)
        return y if self.bias is None else y + self.bias.to(y.dtype), tail

    def extra_repr(self) -> str:
        return f"{self.channels}, width={self.width}"


class TokenShift(nn.Module):
    """x_t + m * (x_{t-1} - x_t) for each of several uses of x, with a learned m [channels] each; x_0 = 0.

    Source: RWKV (arXiv 2305.13048) Sec. 3.1; the initial m rise over the channels, as in RWKV-7.
    """

    def __init__(self, channels: int, names: tuple[str, ...]) -> None:
        super().__init__()
        self.channels, self.names = channels, names
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.empty(channels)))
        reset(self)
        mark_no_weight_decay(self)

    def initial_values(self) -> dict[str, Tensor]:
        return {name: 1 - (torch.arange(self.channels) / self.channels).sqrt() for name in self.names}

    def forward(
        self, x: Tensor, tail: Tensor | None = None, packing: Packing | None = None, keep: bool = False
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """x [B, T, channels] -> ({name: [B, T, channels]}, next tail [rows, 1, channels]); see `ShortConvolution`."""
        before, tail = over_past(lambda row: F.pad(row, (0, 0, 1, 0))[:, :-1], x, 1, tail, packing, keep)
        return {name: torch.addcmul(x, getattr(self, name).to(x.dtype), before - x) for name in self.names}, tail


def over_past(
    function: Callable[[Tensor], Tensor], x: Tensor, gap: int, tail: Tensor | None, packing: Packing | None, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """A causal function [B, S, C] -> [B, S, C] that looks back `gap` tokens, after `tail` [rows, gap, C] or zeros.

    Returns its values at x [B, T, C] (packed: [1, N, C]), and each row's last `gap` inputs if `keep`.
    """
    if packing is not None:
        tokens, front, back = packing.spread(gap, x.device)
        row = x.new_zeros(len(tokens) + len(front), x.shape[-1]).index_copy(0, tokens, x.squeeze(0))
        if tail is not None:
            row = row.index_copy(0, front, tail.to(x.dtype).flatten(0, 1))
        y = function(row.unsqueeze(0)).squeeze(0).index_select(0, tokens).unsqueeze(0)
        return y, row.index_select(0, back).unflatten(0, (packing.num_sequences, gap)) if keep else None
    if tail is not None:
        x = torch.cat((tail.to(x.dtype), x), dim=1)
    y = function(x)
    return y[:, gap:] if tail is not None else y, _last(x, gap) if keep else None


class GateProjection(nn.Module):
    """A rate, a decay or another gate: a `GateMap` of a linear projection of the hidden state, in float32 or float64.

    Hidden states [B, T, hidden_size] and positions [B or 1, T] -> [B, T * steps, H], or [B, T * steps, H, channels]. The
    projection has full rank unless the map gives one; a map that does not depend on the hidden state gets the positions.
    """

    def __init__(self, gate: GateMap, hidden_size: int, num_heads: int, channels: int | None = None, steps: int = 1) -> None:
        super().__init__()
        self.gate, self.steps = gate, steps
        self.shape = (num_heads,) if channels is None else (num_heads, channels)
        width = steps * num_heads * (channels or 1)
        self.proj: nn.Module | None = None
        if gate.projected:
            self.proj = projection(hidden_size, width, gate.rank, gate.between)
        for name, value in self.initial_values().items():
            self.register_parameter(name, nn.Parameter(torch.empty(value.shape)))
        reset(self)
        mark_no_weight_decay(self)

    def initial_values(self) -> dict[str, Tensor]:
        return self.gate.parameters(self.shape)

    def forward(self, hidden_states: Tensor, positions: Tensor) -> Tensor:
        batch, num_tokens = hidden_states.shape[:2]
        shape = (batch, num_tokens * self.steps, *self.shape)
        values = {name: at_least_float32(p) for name, p in self.named_parameters(recurse=False)}
        if self.proj is not None:
            return self.gate(at_least_float32(self.proj(hidden_states)).view(shape), values)
        place = positions.repeat_interleave(self.steps, 1).view(-1, shape[1], *[1] * len(self.shape))
        return self.gate(place.to(hidden_states.device, _wide(hidden_states.dtype)).expand(shape), values)


def default_map(gate: Gate) -> GateMap:
    """The map of a gate that the inputs leave out: it starts at the gate's own initial value."""
    return Softplus(gate.initial) if gate.maximum == float("inf") else Sigmoid(gate.initial, gate.maximum)


def projection(hidden_size: int, width: int, rank: int | None, between: str | None, bias: bool = False) -> nn.Module:
    """A linear projection, of low rank if `rank` is given, with the activation `between` in its middle."""
    require_one_of("between", between, (*GATE_ACTIVATIONS, None))
    require(rank is None or rank >= 1, f"rank={rank}; must be at least 1, or None for full rank")
    require(
        rank is not None or between is None, f"between={between!r} stands in the middle of a low-rank projection: give rank"
    )
    if rank is None:
        return nn.Linear(hidden_size, width, bias=bias)
    return LowRank(hidden_size, rank, width, between, bias)


class LowRank(nn.Sequential):
    """Two linear projections, and an activation by its name in `GATE_ACTIVATIONS` between them."""

    def __init__(self, d_in: int, rank: int, d_out: int, between: str | None, bias: bool) -> None:
        super().__init__(nn.Linear(d_in, rank, bias=False), nn.Linear(rank, d_out, bias=bias))
        self.between = between

    def forward(self, input: Tensor) -> Tensor:
        """[..., d_in] -> [..., d_out]."""
        x = self[0](input)
        return self[1](x if self.between is None else GATE_ACTIVATIONS[self.between](x))


class FeatureNumbers(nn.Module):
    """The learned numbers of a feature map."""

    def __init__(self, features: Features, num_heads: int, key_dim: int, value_dim: int) -> None:
        super().__init__()
        self.features, self.sizes = features, (num_heads, key_dim, value_dim)
        for name, value in self.initial_values().items():
            self.register_parameter(name, nn.Parameter(torch.empty(value.shape)))
        reset(self)
        mark_no_weight_decay(self)

    def initial_values(self) -> dict[str, Tensor]:
        return self.features.parameters(*self.sizes)

    def values(self) -> dict[str, Tensor]:
        """{name: parameter}."""
        return dict(self.named_parameters())


class OutputNorm(nn.Module):
    """The norm of a layer's read-outs [..., H, V]: over each head's channels, or over those of groups of heads.

    `weight` (and `bias`, of a layer norm) has V numbers shared by the heads, or H * V.
    """

    def __init__(self, output: Output, num_heads: int, width: int, eps: float) -> None:
        super().__init__()
        self.output, self.eps = output, eps if output.eps is None else output.eps
        self.groups = output.groups or num_heads
        require(num_heads % self.groups == 0, f"Output groups={output.groups} must divide num_heads={num_heads}")
        self.shape = (width,) if output.shared and output.groups is None else (num_heads, width)
        self.weight = nn.Parameter(torch.empty(math.prod(self.shape)))
        self.bias = nn.Parameter(torch.empty(math.prod(self.shape))) if output.norm == "layer" else None
        reset(self)

    def initial_values(self) -> dict[str, Tensor]:
        values = {"weight": torch.ones(math.prod(self.shape))}
        return values if self.bias is None else {**values, "bias": torch.zeros(math.prod(self.shape))}

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_float32(x).unflatten(-2, (self.groups, -1))
        if self.output.norm == "layer":
            wide = wide - wide.mean((-2, -1), keepdim=True)
        wide = wide * torch.rsqrt(wide.square().mean((-2, -1), keepdim=True) + self.eps)
        y = wide.flatten(-3, -2).to(x.dtype) * self.weight.view(self.shape)
        return y if self.bias is None else y + self.bias.view(self.shape)

    def extra_repr(self) -> str:
        return f"{self.output.norm}, {self.shape}, eps={self.eps}"


class FastWeights(nn.Module):
    """The learned initial dual state A_0 of a memory, [H, d_in, d_out] a weight, and its slow parameters [H, V].

    W_0 is drawn from N(0, std^2), but for offsets, which are 0, and A_0 is unlink(W_0); where A holds logits, A_0 itself is
    drawn. `norm_gain` is the
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
        self.retention, self.std, self.norm_gain, self.offsets = retention, std, norm_gain, memory.offsets
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
            drawn = torch.zeros(shape) if name in self.offsets else self.std * torch.randn(shape)
            values[_escape(name)] = drawn if self.retention.logits else self.retention.unlink(drawn)
        for name, shape in self.slow.items():
            gain = self.norm_gain if name.endswith("weight") else None
            values[_escape(name)] = torch.full(shape, gain or 0.0)
        return values

    def weights(self) -> dict[str, Tensor]:
        """{the memory's name: parameter}."""
        return {name: getattr(self, _escape(name)) for name in (*self.shapes, *self.slow)}


def _causal_products(x: Tensor, w: Tensor) -> Tensor:
    # Without a graph to write, calling the autograd function costs a decoded token more than its products do.
    return _CausalProducts.apply(x, w) if torch.is_grad_enabled() else _CausalProducts.forward(x, w)


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
    return x.to(_wide(x.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _escape(name: str) -> str:
    escaped = name.replace(".", "_")
    require(escaped.isidentifier(), f"fast weight {name!r} must be a name, with dots at most")
    return escaped
