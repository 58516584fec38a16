"""Layers of a memory and softmax attention together: the modules of `MemoryAsGate` and `MemoryAsContext`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miras.choice import require
from miras.design import Arrangement, Design, LayerDesign, MemoryAsContext, MemoryAsGate
from miras.engine import Plan
from miras.engine.problem import AttentionState, MemoryState, State
from miras.layer import LayerState, MemoryLayer
from miras.mixer import Mixer
from miras.packing import Packing


@dataclass(frozen=True)
class ArrangedState(State):
    """What an arrangement needs to go on: the states of its two parts, and of the queries where those have their own.

    memory     its `seen` counts the tokens so far
    attention  of a `MemoryAsContext`: over the segment so far, nothing at its start
    tails      of a `MemoryAsContext`: last inputs of the convolutions that made the queries of the retrieval
    """

    memory: LayerState
    attention: LayerState
    tails: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Plans:
    """Which of the engine's paths each part of an arrangement runs on."""

    memory: Plan
    attention: Plan

    def __str__(self) -> str:
        parts = (f"{name}\n{plan}".replace("\n", "\n  ") for name, plan in vars(self).items())
        return "\n".join(parts)


class ArrangedMixer(Mixer):
    """o = y_norm(y) * silu(m_norm(m)) of an attention layer's y and a memory layer's m; [B, T, hidden_size] to the same.

    Parameters: long_term (the memory) and short_term (attention), each a `MemoryLayer`, m_norm, y_norm.
    """

    long_term: MemoryLayer
    short_term: MemoryLayer

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        design: Arrangement,
        head_dim: int | None = None,
        norm_eps: float = 1e-5,
        layer_idx: int | None = None,
        first: bool = True,
    ) -> None:
        super().__init__()
        self.design, self.layer_idx = design, layer_idx
        self.long_term = MemoryLayer(hidden_size, num_heads, design.memory, head_dim, norm_eps, first=first)
        self.short_term = MemoryLayer(hidden_size, num_heads, design.attention, head_dim, norm_eps)
        self.m_norm = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.y_norm = nn.RMSNorm(hidden_size, eps=norm_eps)

    def mix(
        self,
        x: Tensor,
        past: ArrangedState | None = None,
        packing: Packing | None = None,
        keep: bool = False,
        shared: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, ArrangedState | None]:
        y, m, state = self.branches(x, past, packing, keep, shared)
        # Under autocast projections come out in half precision.
        return self.y_norm(y.to(x.dtype)) * F.silu(self.m_norm(m.to(x.dtype))), state

    def branches(
        self,
        x: Tensor,
        past: ArrangedState | None,
        packing: Packing | None,
        keep: bool,
        shared: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, ArrangedState | None]:
        """What attention and the memory give, y and m, both like x, and the state if `keep`."""
        raise NotImplementedError

    def explain(self) -> Plans:
        """Which of the engine's paths each part runs on, and why the others refuse."""
        return Plans(self.long_term.explain(), self.short_term.explain())


class GateMixer(ArrangedMixer):
    """Titans MAG: attention and the memory side by side, y and m both of x."""

    def branches(
        self,
        x: Tensor,
        past: ArrangedState | None,
        packing: Packing | None,
        keep: bool,
        shared: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, ArrangedState | None]:
        memory, attention = (None, None) if past is None else (past.memory, past.attention)
        y, attention = self.short_term.mix(x, attention, packing, keep)
        m, memory = self.long_term.mix(x, memory, packing, keep, shared)
        return y, m, ArrangedState(memory, attention) if memory and attention else None

    @torch.no_grad()
    def inspect(self, hidden_states: Tensor, shared: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """What the memory does at each token; see `MemoryLayer.inspect`."""
        return self.long_term.inspect(hidden_states, shared)


class ContextMixer(ArrangedMixer):
    """Titans MAC: segment by segment, attention over what the memory knew at its start, which then learns the outputs.

    See `MemoryAsContext` for the formula. The segments of a sequence run one after the other, rows together.
    """

    design: MemoryAsContext

    def branches(
        self,
        x: Tensor,
        past: ArrangedState | None,
        packing: Packing | None,
        keep: bool,
        shared: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, ArrangedState | None]:
        num_rows = packing.shape[0] if packing is not None else x.shape[0]
        if past is not None:
            require(past.rows == num_rows, f"the cache holds {past.rows} sequences, the batch has {num_rows}")
        memory, attention = (None, None) if past is None else (past.memory, past.attention)
        q, tails = self._queries(x, past, packing)
        seen = torch.zeros(num_rows, dtype=torch.int64) if past is None else past.memory.seen
        pieces: list[tuple[Tensor, Tensor]] = []
        places: list[Tensor] = []
        for part in segments(x, packing, seen, self.design.segment):
            here = part.take(x)
            r = self.long_term.recall(part.take(q), here, held(memory, part.rows), part.packing(1))
            both = torch.stack((r, here), dim=2).flatten(1, 2)
            y, attention = self.short_term.mix(both, attention, part.packing(2), keep=True)
            y = y[:, 1::2].to(x.dtype)
            m, memory = self.long_term.mix(y, memory, part.packing(1), keep=True)
            assert attention is not None and memory is not None
            attention = forget(attention, part.ended)
            pieces.append((y.flatten(0, 1), m.flatten(0, 1)))
            places.append(part.tokens)
        order = torch.cat(places).argsort().to(x.device)
        y, m = (torch.cat(column)[order].view_as(x) for column in zip(*pieces, strict=True))
        return y, m, ArrangedState(memory, attention, tails) if keep and memory and attention else None

    def _queries(self, x: Tensor, past: ArrangedState | None, packing: Packing | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The retrieval's q [B, T, H, K], which depend on x alone, and the next tails of every row."""
        rows = packing.rows if packing is not None else None
        here = past if past is None or rows is None else past.index_select(rows)
        reader = None if here is None else replace(here.memory, conv=here.tails)
        q, tails = self.long_term.queries(x, reader, packing, keep=True)
        if packing is not None and rows is not None:
            old = past.tails if past is not None else [t.new_zeros(packing.shape[0], *t.shape[1:]) for t in tails]
            tails = tuple(a.index_copy(0, rows.to(a.device), b) for a, b in zip(old, tails, strict=True))
        return q, tails

    @torch.no_grad()
    def inspect(self, hidden_states: Tensor, shared: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """What the memory does at each token, as it learns the outputs of attention; see `MemoryLayer.inspect`."""
        y, _, _ = self.branches(hidden_states, None, None, keep=False)
        return self.long_term.inspect(y)


@dataclass(frozen=True)
class Part:
    """Tokens in a row from each of some sequences, none of which goes past the end of its segment.

    tokens  [n] places in the flattened batch, sequence after sequence, `sizes` [r] of each
    rows    [r] batch row of each sequence (None: sequence r is row r, and no row is left out)
    ended   batch rows whose segment is complete with them
    """

    tokens: Tensor
    sizes: Tensor
    rows: Tensor | None
    ended: Tensor
    num_rows: int

    @property
    def even(self) -> bool:
        """Whether every row has as many tokens: they are a batch, and need no packing."""
        return self.rows is None and bool((self.sizes == self.sizes[0]).all())

    def take(self, x: Tensor) -> Tensor:
        """The tokens of x [B, T, ...], [B, n / B, ...] or packed [1, n, ...]."""
        taken = x.flatten(0, 1)[self.tokens.to(x.device)]
        return taken.unflatten(0, (self.num_rows if self.even else 1, -1))

    def packing(self, scale: int) -> Packing | None:
        """How they are packed, with `scale` entries a token."""
        if self.even:
            return None
        sizes = scale * self.sizes
        return Packing(F.pad(sizes.cumsum(0), (1, 0)), None, self.rows, (self.num_rows, int(sizes.max())))


def segments(x: Tensor, packing: Packing | None, seen: Tensor, size: int) -> Iterator[Part]:
    """x [B, T, ...] (or packed) cut at the ends of segments of `size` tokens, rows having `seen` [B] tokens before it."""
    bounds = torch.arange(x.shape[0] + 1) * x.shape[1] if packing is None else packing.bounds
    rows = torch.arange(len(seen)) if packing is None or packing.rows is None else packing.rows
    now, stop, phase = bounds[:-1], bounds[1:], seen[rows] % size
    while bool((now < stop).any()):
        step = torch.minimum(size - phase, stop - now)
        at = step.nonzero().squeeze(1)
        tokens = torch.cat([torch.arange(int(a), int(a + n)) for a, n in zip(now[at], step[at], strict=True)])
        ended = rows[at[(phase + step)[at] == size]]
        yield Part(tokens, step[at], None if len(at) == len(seen) else rows[at], ended, len(seen))
        now, phase = now + step, (phase + step) % size


def held(memory: LayerState | None, rows: Tensor | None) -> MemoryState | None:
    """What the memories of some rows (None: all) hold."""
    if memory is None:
        return None
    assert isinstance(memory.memory, MemoryState)
    return memory.memory if rows is None else memory.memory.index_select(rows)


def forget(attention: LayerState, rows: Tensor) -> LayerState:
    """The state of attention in which some rows have seen nothing yet."""
    if len(rows) == 0:
        return attention
    empty = attention.map(lambda x: x.index_fill(0, rows.to(x.device), 0))
    assert isinstance(empty.memory, AttentionState)
    return replace(empty, memory=empty.memory.trim())


MIXERS: dict[type[LayerDesign], Callable[..., Mixer]] = {
    Design: MemoryLayer,
    MemoryAsGate: GateMixer,
    MemoryAsContext: ContextMixer,
}
"""The module of each kind of design for a layer."""


def make_mixer(
    design: LayerDesign,
    hidden_size: int,
    num_heads: int,
    head_dim: int | None = None,
    norm_eps: float = 1e-5,
    layer_idx: int | None = None,
    first: bool = True,
) -> Mixer:
    """The sequence mixer of a layer; arguments as in `MemoryLayer`.

    >>> mixer = make_mixer(miras.models.titans_mac(), hidden_size=256, num_heads=4)
    >>> o, _, _ = mixer(torch.randn(2, 100, 256))

    Raises:
        TypeError: `design` is no design for a layer.
    """
    if type(design) not in MIXERS:
        raise TypeError(f"{type(design).__name__} has no mixer; one of {', '.join(kind.__name__ for kind in MIXERS)} has")
    return MIXERS[type(design)](hidden_size, num_heads, design, head_dim, norm_eps, layer_idx, first)
