"""Typed inputs and states of the engine, and the checks that turn a user's tensors into them.

Inside the engine heads come before time, and time is counted in gradient steps, N = T * micro_steps: q, k [B, H, N, K],
v [B, H, N, V], rates and decays [B, H, N] or [B, H, N, C], gates [B, H, N]. A token's query stands at each of its steps,
and its output is the one at the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from miras.design import Design
from miras.memory import WeightShape


@dataclass(frozen=True)
class State:
    """A batch of recurrent states, one row a sequence; every tensor's first axis is the row.

    Its fields are tensors, or dictionaries or tuples of them, or states. Counters are integers, and stay on the CPU.
    """

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Apply a function to every tensor."""
        return replace(self, **{item.name: _mapped(getattr(self, item.name), function) for item in fields(self)})

    def tensors(self) -> list[Tensor]:
        """Every tensor of the state."""
        return list(self._tensors())

    def _tensors(self) -> Iterator[Tensor]:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, State):
                yield from value._tensors()
            elif isinstance(value, Tensor):
                yield value
            else:
                yield from value.values() if isinstance(value, dict) else value

    def index_select(self, rows: Tensor) -> Self:
        """Rows picked (and repeated) by index, as beam search does."""
        return self.map(lambda x: x.index_select(0, rows.to(x.device)))

    def put(self, rows: Tensor, new: Self) -> Self:
        """This state with `new` in the place of some rows."""
        tensors = iter(new.tensors())
        return self.map(lambda x: _put(x, rows, next(tensors)))

    def to(self, device: torch.device | str) -> Self:
        """The state on another device (counters stay on the CPU)."""
        return self.map(lambda x: x.to(device) if x.is_floating_point() else x)

    def detach(self) -> Self:
        """The same state, cut off from the graph."""
        return self.map(Tensor.detach)

    @property
    def rows(self) -> int:
        """Number of sequences."""
        return next(self._tensors()).shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(x.numel() * x.element_size() for x in self.tensors())


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, State):
        return value.map(function)
    if isinstance(value, tuple):
        return tuple(function(x) for x in cast("tuple[Tensor, ...]", value))
    return {name: function(x) for name, x in value.items()}


def _put(old: Tensor, rows: Tensor, new: Tensor) -> Tensor:
    # Keys and values of softmax attention are aligned to the right, and may be longer on either side.
    if old.dim() > 1 and old.shape[1] != new.shape[1]:
        width = max(old.shape[1], new.shape[1])
        old, new = (F.pad(x, [0, 0] * (x.dim() - 2) + [width - x.shape[1], 0]) for x in (old, new))
    return old.index_copy(0, rows.to(old.device), new.to(old.dtype))


@dataclass(frozen=True)
class MemoryState(State):
    """What a parametric memory needs to go on, at any token, in the middle of a window too.

    slots  per weight [B, H, slots, d_in, d_out]: deviation from the anchor A - a first, then what the learning keeps
    point  per weight [B, H, d_in, d_out]: the deviation at the last window end, where gradients are taken
    phase  [B] int64 on the CPU: gradient steps since the last window end
    """

    slots: dict[str, Tensor]
    point: dict[str, Tensor]
    phase: Tensor


@dataclass(frozen=True)
class AttentionState(State):
    """Past keys and values [B, S, H, D] of softmax attention, aligned to the right; `length` [B] counts the real ones."""

    keys: Tensor
    values: Tensor
    length: Tensor

    def trim(self) -> AttentionState:
        """Without the columns that are real in no row."""
        start = self.keys.shape[1] - int(self.length.max())
        return replace(self, keys=self.keys[:, start:].clone(), values=self.values[:, start:].clone())


@dataclass(frozen=True)
class Problem:
    """A batch of equally long sequences for a parametric design, in the engine's layout and in float32 or float64.

    `weights` are the initial dual states [H, d_in, d_out] and `anchor` what they relax to; `slow` [H, 1, V].
    """

    design: Design
    q: Tensor
    k: Tensor
    v: Tensor
    lr: Tensor
    log_decay: Tensor
    gates: dict[str, Tensor]
    weights: dict[str, Tensor]
    slow: dict[str, Tensor]
    shapes: dict[str, WeightShape]

    @property
    def num_steps(self) -> int:
        return self.k.shape[2]

    def anchor(self, name: str) -> Tensor:
        """What weight `name` relaxes to, [H, d_in, d_out]."""
        weight = self.weights[name]
        return weight if self.design.anchor == "initial" else torch.zeros_like(weight)

    def tensors(self) -> list[Tensor]:
        """Every tensor of the problem."""
        sequences = [self.q, self.k, self.v, self.lr, self.log_decay]
        return [*sequences, *self.gates.values(), *self.weights.values(), *self.slow.values()]

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Problem:
        """The problem with every sequence [B, H, N, ...] changed by a function."""
        sequences = {name: function(getattr(self, name)) for name in ("q", "k", "v", "lr", "log_decay")}
        return replace(self, **sequences, gates={name: function(x) for name, x in self.gates.items()})

    def part(self, start: int, stop: int, rows: Tensor) -> Problem:
        """Gradient steps start to stop of some rows."""
        return self.mapped(lambda x: x.index_select(0, rows.to(x.device))[:, :, start:stop])

    def initial_state(self) -> MemoryState:
        """The state before the first token: A_0."""
        learning, batch = self.design.learning, self.q.shape[0]
        slots, point = {}, {}
        for name, weight in self.weights.items():
            deviation = (weight - self.anchor(name)).expand(batch, *weight.shape)
            slots[name] = torch.stack(learning.start(deviation), dim=2)
            point[name] = deviation
        return MemoryState(slots, point, torch.zeros(batch, dtype=torch.int64))


def build_problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    design: Design,
    weights: Mapping[str, Tensor],
    lr: Tensor,
    log_decay: Tensor | None,
    gates: Mapping[str, Tensor],
) -> Problem:
    """Bring checked tensors [B, T, H, D] into the engine's layout, half precision raised to float32."""
    assert design.memory is not None
    n = design.learning.micro_steps
    dtype = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype) else torch.float32
    shapes = design.memory.weights(k.shape[-1], v.shape[-1])
    q = q.repeat_interleave(n, dim=1) if n > 1 else q
    head_first = {name: x.to(dtype).transpose(1, 2) for name, x in {"q": q, "k": k, "v": v, "lr": lr}.items()}
    if log_decay is None:
        log_decay = torch.zeros(k.shape[:3], dtype=dtype, device=q.device)[:, ::n]
    log_decay = log_decay.to(dtype).transpose(1, 2)
    if n > 1:
        still = torch.zeros_like(log_decay).unsqueeze(3).expand(*log_decay.shape[:3], n - 1, *log_decay.shape[3:])
        log_decay = torch.cat((log_decay.unsqueeze(3), still), dim=3).flatten(2, 3)
    slow_names = design.slow_names(v.shape[-1])
    return Problem(
        design=design,
        **head_first,
        log_decay=log_decay,
        gates={name: x.to(dtype).transpose(1, 2) for name, x in gates.items()},
        weights={name: weights[name].to(dtype) for name in shapes},
        slow={name: weights[name].to(dtype).unsqueeze(1) for name in slow_names if name in weights},
        shapes=shapes,
    )
