"""The memory layer: an associative memory that learns at test time, in the place of an attention layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miras.choice import Gate, require
from miras.design import Design
from miras.engine import explain, memorize, recall
from miras.engine.problem import AttentionState, MemoryState, State, build_problem
from miras.inputs import GateMap, Sigmoid, Softplus
from miras.mixer import Mixer
from miras.modules import FastWeights, GateProjection, ShortConvolution
from miras.packing import Packing
from miras.persistent import PersistentTokens


@dataclass(frozen=True)
class LayerState(State):
    """What a layer needs to go on after a sequence's last token; every tensor's first axis is the sequence.

    conv    last inputs of the short convolutions of q, k, v, [B, conv_size - 1, channels] each; empty without them
    memory  the memory's state, or past keys and values for softmax attention
    seen    [B] int64 on the CPU: tokens so far
    """

    conv: tuple[Tensor, ...]
    memory: MemoryState | AttentionState
    seen: Tensor


@dataclass(frozen=True)
class Stream:
    """A memory's inputs as the layer made them: what `miras.memorize` takes, and the next convolution tails."""

    q: Tensor
    k: Tensor
    v: Tensor
    lr: Tensor | None
    log_decay: Tensor | None
    gates: dict[str, Tensor]
    tails: tuple[Tensor, ...]


class MemoryLayer(Mixer):
    """A sequence mixer [B, T, hidden_size] -> [B, T, hidden_size] that learns (k_t, v_t) and reads q_t at every token.

        q, k, v = conv(x Wq), conv(x Wk), conv(x Wv), with SiLU; features (such as unit length) on q and k
        eta, log alpha, further gates = gate maps of x
        o = (norm(memorize(q, k, v, ...)) * silu(x Wg)) Wo

    Sizes: `num_heads` heads of `head_dim` (default hidden_size / num_heads) channels for keys and values alike; with
    `learning.micro_steps` n there are n keys, values, rates and gates a token.

    Parameters: q_proj, k_proj, v_proj, q_conv1d, k_conv1d, v_conv1d (where `inputs.conv_size` > 0), b_proj (rate),
    a_proj (decay), gate_projs (further gates), memory (A_0 and the memory's slow parameters), o_norm, g_proj, o_proj.
    A gate that `inputs.gates` leaves out is `Sigmoid` of its own initial and maximum, or `Softplus` where it has no
    maximum. A non-parametric design has neither memory nor gates: it is softmax attention, with the same projections.

    Gates, decays and the memory are computed in float32 at least, whatever the hidden states' dtype.

    >>> layer = MemoryLayer(hidden_size=256, num_heads=4, design=miras.models.yaad())
    >>> o, _, _ = layer(torch.randn(2, 100, 256))

    Raises:
        TypeError: `design` is not a Design.
        ValueError: sizes that do not fit, gates that the design does not read, per-channel gates that it cannot apply.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        design: Design,
        head_dim: int | None = None,
        norm_eps: float = 1e-5,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(design, Design):
            raise TypeError(
                f"design must be a miras Design, got {type(design).__name__}; a Pattern arranges the layers of a whole "
                "model: give it to MirasConfig, or one of its .designs here"
            )
        require(min(num_heads, hidden_size) >= 1, f"hidden_size={hidden_size}, num_heads={num_heads}; at least 1 each")
        require(
            head_dim is not None or hidden_size % num_heads == 0,
            f"hidden_size={hidden_size} is not divisible by num_heads={num_heads}; choose another number of heads, or "
            "give head_dim",
        )
        self.hidden_size, self.num_heads, self.design, self.layer_idx = hidden_size, num_heads, design, layer_idx
        self.head_dim = head_dim if head_dim is not None else hidden_size // num_heads
        require(self.head_dim >= 1, f"head_dim={head_dim}; must be at least 1")
        self._add_projections(norm_eps)
        if design.parametric:
            self._add_memory()
        elif (persistent := getattr(design.learning, "persistent", 0)) > 0:
            self.persistent = PersistentTokens(persistent, hidden_size)
        if design.inputs.aligned:
            self.align()

    def _add_projections(self, norm_eps: float) -> None:
        inputs, steps, width = self.design.inputs, self.design.learning.micro_steps, self.num_heads * self.head_dim
        self.q_proj = nn.Linear(self.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(self.hidden_size, steps * width, bias=False)
        self.v_proj = nn.Linear(self.hidden_size, steps * width, bias=False)
        if inputs.conv_size > 0:
            self.q_conv1d = ShortConvolution(width, inputs.conv_size)
            self.k_conv1d = ShortConvolution(steps * width, inputs.conv_size)
            self.v_conv1d = ShortConvolution(steps * width, inputs.conv_size)
        if inputs.output_norm:
            self.o_norm = nn.RMSNorm(self.head_dim, eps=norm_eps)
        if inputs.output_gate:
            self.g_proj = nn.Linear(self.hidden_size, width, bias=False)
        self.o_proj = nn.Linear(width, self.hidden_size, bias=False)

    def _add_memory(self) -> None:
        design, inputs = self.design, self.design.inputs
        assert design.memory is not None
        assert design.retention is not None
        self.memory = FastWeights(
            design.memory,
            design.retention,
            self.num_heads,
            self.head_dim,
            self.head_dim,
            inputs.weight_std * (1.0 if design.retention.logits else self.head_dim**-0.5),
            None if inputs.norm_gain is None else inputs.norm_gain * self.head_dim**-0.5,
        )
        declared = {gate.name: gate for gate in design.gates}
        unknown = sorted(set(inputs.gates) - set(declared))
        require(
            not unknown,
            f"inputs.gates has {', '.join(unknown)}; this design reads {', '.join(declared) or 'no further gates'}",
        )
        steps = design.learning.micro_steps
        self.b_proj = self._gate("rate", inputs.rate, steps)
        if inputs.decay is not None:
            self.a_proj = self._gate("decay", inputs.decay, 1)
        gates = {name: inputs.gates.get(name) or default_map(gate) for name, gate in declared.items()}
        for name, gate in gates.items():
            require(not gate.per_channel, f"gate {name!r} is one number a head; give its map per_channel=False")
        self.gate_projs = nn.ModuleDict({name: self._gate(name, gate, steps) for name, gate in gates.items()})

    @torch.no_grad()
    def align(self) -> None:
        """Start the query projection as a copy of the (first) key projection."""
        self.q_proj.weight.copy_(self.k_proj.weight[: self.q_proj.out_features])

    def _gate(self, name: str, gate: GateMap, steps: int) -> GateProjection:
        assert self.design.memory is not None
        if not gate.per_channel:
            return GateProjection(gate, self.hidden_size, self.num_heads, None, steps)
        shapes = self.design.memory.weights(self.head_dim, self.head_dim)
        for weight, shape in shapes.items():
            axis = shape.channel_axis
            require(
                axis is not None and (shape.d_in, shape.d_out)[axis] == self.head_dim,
                f"the {name} is per channel, but weight {weight!r} of {self.design.memory} has no axis of head_dim="
                f"{self.head_dim} channels; give it per_channel=False",
            )
        return GateProjection(gate, self.hidden_size, self.num_heads, self.head_dim, steps)

    def mix(
        self, x: Tensor, past: LayerState | None = None, packing: Packing | None = None, keep: bool = False
    ) -> tuple[Tensor, LayerState | None]:
        """Outputs for x [B, T, hidden_size] (or packed, [1, N, hidden_size]) after `past`, and the state if `keep`."""
        num_rows = packing.shape[0] if packing is not None else x.shape[0]
        rows = packing.rows if packing is not None else None
        if past is not None:
            require(past.rows == num_rows, f"the cache holds {past.rows} sequences, the batch has {num_rows}")
        here = past if past is None or rows is None else past.index_select(rows)
        stream = self._stream(x, here, packing, keep)
        out, memory = memorize(
            stream.q,
            stream.k,
            stream.v,
            design=self.design,
            weights=self._weights(),
            lr=stream.lr,
            log_decay=stream.log_decay,
            gates=stream.gates,
            initial_state=here.memory if here is not None else None,
            output_final_state=keep,
            cu_seqlens=packing.bounds if packing is not None else None,
            check=False,
        )
        o = self._read_out(out, x)
        if not keep:
            return o, None
        assert memory is not None
        added = packing.bounds.diff() if packing is not None else torch.full((num_rows,), x.shape[1])
        state = LayerState(stream.tails, memory, added if here is None else here.seen + added)
        if rows is not None:
            state = (past if past is not None else self._blank(state, num_rows)).put(rows, state)
        return o, state

    def queries(
        self, x: Tensor, past: LayerState | None, packing: Packing | None, keep: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """q [B, T, H, K] at x after `past` (whose rows are the sequences), and the next convolution tails if `keep`."""
        stream = self._stream(x, past, packing, keep)
        return stream.q, stream.tails

    def recall(self, q: Tensor, x: Tensor, memory: MemoryState | None, packing: Packing | None) -> Tensor:
        """What the memory held at its last window end, read at q [B, T, H, K], as outputs at x; nothing is written."""
        bounds = packing.bounds if packing is not None else None
        out = recall(q, design=self.design, weights=self._weights(), state=memory, cu_seqlens=bounds)
        return self._read_out(out, x)

    def _stream(self, x: Tensor, past: LayerState | None, packing: Packing | None, keep: bool) -> Stream:
        """What the memory is fed at each token: q [B, T, H, K], k and v [B, T * n, H, K], rates, decays and gates."""
        n, inputs = self.design.learning.micro_steps, self.design.inputs
        tails = past.conv if past is not None and past.conv else (None, None, None)
        mixed, kept = [], []
        for name, tail in zip("qkv", tails, strict=True):
            y = getattr(self, f"{name}_proj")(x)
            if inputs.conv_size > 0:
                y, tail = getattr(self, f"{name}_conv1d")(y, tail, packing, keep)
                kept.append(tail)
            y = F.silu(y) if inputs.activation == "silu" else y
            mixed.append(y.unflatten(-1, (-1, self.head_dim)))
        q, k, v = mixed
        q, k, v = inputs.features(q, k, v, _positions(x, past, packing))
        if n > 1:
            k, v = (y.unflatten(2, (n, -1)).flatten(1, 2) for y in (k, v))
        lr = log_decay = None
        gates: dict[str, Tensor] = {}
        if self.design.parametric:
            lr = self.b_proj(x)
            log_decay = self.a_proj(x) if inputs.decay is not None else None
            gates = {name: gate(x) for name, gate in self.gate_projs.items()}
        return Stream(q, k, v, lr, log_decay, gates, tuple(kept) if keep else ())

    def _read_out(self, out: Tensor, x: Tensor) -> Tensor:
        """[B, T, H, V] -> [B, T, hidden_size]."""
        out = out.to(x.dtype)
        if self.design.inputs.output_norm:
            out = self.o_norm(out)
        out = out.flatten(2)
        if self.design.inputs.output_gate:
            out = out * F.silu(self.g_proj(x))
        return self.o_proj(out)

    def _weights(self) -> dict[str, Tensor]:
        if self.design.parametric:
            return self.memory.weights()
        if getattr(self.design.learning, "persistent", 0) == 0:
            return {}
        # Each token is a sequence of its own: it stands at position 0.
        stream = self._stream(self.persistent.tokens.unsqueeze(1), None, None, keep=False)
        return {name: x.squeeze(1).transpose(0, 1) for name, x in (("keys", stream.k), ("values", stream.v))}

    def _blank(self, like: LayerState, num_rows: int) -> LayerState:
        """The state of sequences that have seen nothing yet."""
        memory: MemoryState | AttentionState
        conv = tuple(x.new_zeros(num_rows, *x.shape[1:]) for x in like.conv)
        seen = torch.zeros(num_rows, dtype=torch.int64)
        if isinstance(like.memory, AttentionState):
            none = [x.new_zeros(num_rows, *x.shape[1:]) for x in (like.memory.keys, like.memory.values)]
            memory = AttentionState(*none, length=seen)
        else:
            o = next(iter(self._weights().values())).new_zeros(num_rows, 1, self.num_heads, self.head_dim)
            o = o.to(next(iter(like.memory.tensors())).dtype)
            empty = build_problem(
                o, o, o, design=self.design, weights=self._weights(), lr=o[..., 0], log_decay=None, gates={}
            )
            memory = empty.initial_state()
        return LayerState(conv, memory, seen)

    def explain(self) -> Any:
        """Which of the engine's paths this layer runs on, and why the others refuse."""
        maps = (self.design.inputs.rate, self.design.inputs.decay)
        per_channel = self.design.parametric and any(gate is not None and gate.per_channel for gate in maps)
        weight = self.o_proj.weight
        return explain(self.design, device=weight.device, dtype=weight.dtype, per_channel=per_channel)

    @torch.no_grad()
    def inspect(self, hidden_states: Tensor) -> dict[str, Tensor]:
        """What the memory does at each token of hidden_states [B, T, hidden_size], detached; a token loop, for short T.

        lr, log_decay, and each gate by name: [B, T, H] (or [B, T, H, C]; with n micro-steps a token [B, T * n, ...])
        loss_before, loss_after: [B, T, H], the inner loss at (k_t, v_t) with W_{t-1} and with W_t, W = link(A)
        drift: [B, T, H], the Euclidean norm of A_t - A_0 over all weights

        Raises:
            ValueError: the design keeps no fast weights.
        """
        from miras.inspection import inspect_stream

        require(self.design.parametric, f"{self.design.learning.kind} keeps no fast weights: nothing to inspect")
        stream = self._stream(hidden_states, None, None, keep=False)
        return inspect_stream(self.design, self._weights(), stream)

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, num_heads={self.num_heads}, head_dim={self.head_dim}"


def default_map(gate: Gate) -> GateMap:
    """The map of a gate that the inputs leave out: it starts at the gate's own initial value."""
    return Softplus(gate.initial) if gate.maximum == float("inf") else Sigmoid(gate.initial, gate.maximum)


def _positions(x: Tensor, past: LayerState | None, packing: Packing | None) -> Tensor:
    """[B, T], or [1, N] packed: each token's position from the start of its sequence, past calls included."""
    if packing is None:
        positions = torch.arange(x.shape[1]).unsqueeze(0)
        positions = positions if past is None else positions + past.seen.unsqueeze(1)
    else:
        positions = packing.position if past is None else packing.position + past.seen[packing.sequence]
        positions = positions.unsqueeze(0)
    return positions.to(x.device)
