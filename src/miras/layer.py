"""The memory layer: an associative memory that learns at test time, in the place of an attention layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miras.choice import require
from miras.design import Design
from miras.engine import explain, memorize, recall
from miras.engine.problem import AttentionState, MemoryState, State, build_problem
from miras.inputs import GATE_ACTIVATIONS, GateMap, Stream
from miras.mixer import Mixer
from miras.modules import (
    FastWeights,
    FeatureNumbers,
    GateProjection,
    OutputNorm,
    ShortConvolution,
    TokenShift,
    default_map,
    projection,
)
from miras.packing import Packing
from miras.persistent import PersistentTokens


@dataclass(frozen=True)
class LayerState(State):
    """What a layer needs to go on after a sequence's last token; every tensor's first axis is the sequence.

    conv    last inputs of the short convolutions of q, k, v, [B, conv_size - 1, channels] each, then the last hidden state
            [B, 1, hidden_size] with a token shift; empty without them
    memory  the memory's state, or past keys and values for softmax attention
    seen    [B] int64 on the CPU: tokens so far
    """

    conv: tuple[Tensor, ...]
    memory: MemoryState | AttentionState
    seen: Tensor


class MemoryLayer(Mixer):
    """A sequence mixer [B, T, hidden_size] -> [B, T, hidden_size] that learns (k_t, v_t) and reads q_t at every token.

        q, k, v = conv(x Wq), conv(x Wk), conv(x Wv), with SiLU; features (such as unit length) on q and k
        eta, log alpha, further gates = gate maps of x
        o = (norm(memorize(q, k, v, ...)) * silu(x Wg)) Wo

    Sizes: `num_heads` heads of `head_dim` (default hidden_size / num_heads) channels, times `inputs.key_ratio` for keys and
    `inputs.value_ratio` for values; with `learning.micro_steps` n there are n keys, values, rates and gates a token.

    Parameters: q_proj, k_proj, v_proj, q_conv1d, k_conv1d, v_conv1d (where `inputs.conv_size` > 0), token_shift (where the
    inputs have it), features (where they learn anything), b_proj (rate), a_proj (decay), gate_projs (further gates), memory
    (A_0 and the memory's slow parameters), o_norm, g_proj, o_proj.
    A gate that `inputs.gates` leaves out is `Sigmoid` of its own initial and maximum, or `Softplus` where it has no
    maximum. A non-parametric design has neither memory nor gates: it is softmax attention, with the same projections.
    `first` says that no earlier layer of the model has features that hand something on to this one's.

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
        first: bool = True,
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
        self.key_dim = _width("key_ratio", design.inputs.key_ratio, self.head_dim)
        self.value_dim = _width("value_ratio", design.inputs.value_ratio, self.head_dim)
        self.key_heads = design.inputs.key_heads or num_heads
        require(
            num_heads % self.key_heads == 0,
            f"key_heads={self.key_heads} must divide num_heads={num_heads}",
        )
        self._add_projections(norm_eps)
        self._add_features(first)
        if design.parametric:
            self._add_memory(first)
        elif design.learning.num_persistent > 0:
            self.persistent = PersistentTokens(design.learning.num_persistent, hidden_size)
        if design.inputs.aligned:
            self.align()

    @property
    def _steps(self) -> int:
        """Keys, values and rates that are projected for each token."""
        return self.design.learning.micro_steps if self.design.inputs.features.makes_steps == 0 else 1

    def _add_projections(self, norm_eps: float) -> None:
        inputs, output = self.design.inputs, self.design.inputs.output
        keys, values = self.key_heads * self.key_dim, self.num_heads * self.value_dim
        self.q_proj = nn.Linear(self.hidden_size, keys, bias=False)
        self.k_proj = nn.Linear(self.hidden_size, self._steps * keys, bias=False)
        self.v_proj = nn.Linear(self.hidden_size, self._steps * values, bias=False)
        if inputs.conv_size > 0:
            self.q_conv1d = ShortConvolution(keys, inputs.conv_size, inputs.conv_bias)
            self.k_conv1d = ShortConvolution(self._steps * keys, inputs.conv_size, inputs.conv_bias)
            self.v_conv1d = ShortConvolution(self._steps * values, inputs.conv_size, inputs.conv_bias)
        if inputs.token_shift:
            self.token_shift = TokenShift(self.hidden_size, SHIFTED)
        if output.norm is not None:
            self.o_norm = OutputNorm(output, self.num_heads, self.value_dim, norm_eps)
        if output.gate is not None:
            self.g_proj = projection(self.hidden_size, values, output.rank, output.between, output.gate_bias)
        self.o_proj = nn.Linear(values, self.hidden_size, bias=False)

    def _add_features(self, first: bool) -> None:
        features = self.design.inputs.features
        numbers = FeatureNumbers(features, self.num_heads, self.key_dim, self.value_dim)
        self.features = numbers if numbers.values() else None
        self._own_gates = {gate.name: gate for gate in features.gates(first)}

    def _add_memory(self, first: bool) -> None:
        design, inputs = self.design, self.design.inputs
        assert design.memory is not None
        assert design.retention is not None
        key_dim, value_dim = self._memory_widths
        self.memory = FastWeights(
            design.memory,
            design.retention,
            self.num_heads,
            key_dim,
            value_dim,
            inputs.weight_std * (1.0 if design.retention.logits else key_dim**-0.5),
            None if inputs.norm_gain is None else inputs.norm_gain * value_dim**-0.5,
        )
        made = inputs.features.supplies
        declared = {gate.name: gate for gate in design.gates if gate.name not in made}
        possible = {*declared, *(gate.name for gate in inputs.features.gates(False))}
        unknown = sorted(set(inputs.gates) - possible)
        require(
            not unknown,
            f"inputs.gates has {', '.join(unknown)}; this design reads {', '.join(sorted(possible)) or 'no further gates'}",
        )
        self.b_proj = self._gate("rate", inputs.rate, self._steps)
        if inputs.decay is not None:
            self.a_proj = self._gate("decay", inputs.decay, 1)
        self.gate_projs = nn.ModuleDict()
        for name, gate in declared.items():
            chosen = inputs.gates.get(name) or default_map(gate)
            require(not chosen.per_channel, f"gate {name!r} is one number a head; give its map per_channel=False")
            self.gate_projs[name] = self._gate(name, chosen, self._steps)
        for name, gate in self._own_gates.items():
            chosen = inputs.gates.get(name) or default_map(gate)
            self.gate_projs[name] = GateProjection(chosen, self.hidden_size, self.num_heads, self.value_dim)

    @property
    def _memory_widths(self) -> tuple[int, int]:
        return self.design.inputs.memory_widths(self.head_dim)

    @torch.no_grad()
    def align(self) -> None:
        """Start the query projection as a copy of the (first) key projection."""
        self.q_proj.weight.copy_(self.k_proj.weight[: self.q_proj.out_features])

    def _gate(self, name: str, gate: GateMap, steps: int) -> GateProjection:
        assert self.design.memory is not None
        if not gate.per_channel:
            return GateProjection(gate, self.hidden_size, self.num_heads, None, steps)
        channels, value_dim = self._memory_widths
        for weight, shape in self.design.memory.weights(channels, value_dim).items():
            axis = shape.channel_axis
            require(
                axis is not None and (shape.d_in, shape.d_out)[axis] == channels,
                f"the {name} is per channel, but weight {weight!r} of {self.design.memory} has no axis of "
                f"{channels} channels, the key width; give it per_channel=False",
            )
        return GateProjection(gate, self.hidden_size, self.num_heads, channels, steps)

    def mix(
        self,
        x: Tensor,
        past: LayerState | None = None,
        packing: Packing | None = None,
        keep: bool = False,
        shared: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, LayerState | None]:
        """Outputs for x [B, T, hidden_size] (or packed, [1, N, hidden_size]) after `past`, and the state if `keep`."""
        num_rows = packing.shape[0] if packing is not None else x.shape[0]
        rows = packing.rows if packing is not None else None
        if past is not None:
            require(past.rows == num_rows, f"the cache holds {past.rows} sequences, the batch has {num_rows}")
        here = past if past is None or rows is None else past.index_select(rows)
        uses, tails = self._uses(x, here, packing, keep)
        stream = self._stream(uses, _positions(x, here, packing), shared)
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
        o = self._read_out(out, stream, uses["gate"])
        if not keep:
            return o, None
        assert memory is not None
        added = packing.bounds.diff() if packing is not None else torch.full((num_rows,), x.shape[1])
        state = LayerState(tails, memory, added if here is None else here.seen + added)
        if rows is not None:
            state = (past if past is not None else self._blank(state, num_rows)).put(rows, state)
        return o, state

    def queries(
        self, x: Tensor, past: LayerState | None, packing: Packing | None, keep: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """q [B, T, H, K] at x after `past` (whose rows are the sequences), and the next convolution tails if `keep`."""
        uses, tails = self._uses(x, past, packing, keep)
        return self._stream(uses, _positions(x, past, packing), None).q, tails

    def recall(self, q: Tensor, x: Tensor, memory: MemoryState | None, packing: Packing | None) -> Tensor:
        """What the memory held at its last window end, read at q [B, T, H, K], as outputs at x; nothing is written."""
        bounds = packing.bounds if packing is not None else None
        out = recall(q, design=self.design, weights=self._weights(), state=memory, cu_seqlens=bounds)
        return self._read_out(out, None, x)

    def _uses(
        self, x: Tensor, past: LayerState | None, packing: Packing | None, keep: bool
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """q, k and v (projected, convolved and activated), what the gates are projected from, and the next tails."""
        inputs = self.design.inputs
        tails: list[Tensor | None] = list(past.conv) if past is not None else []
        kept: list[Tensor | None] = []
        uses: dict[str, Tensor] = dict.fromkeys(SHIFTED, x)
        shifted = None
        if inputs.token_shift:
            uses, shifted = self.token_shift(x, tails.pop() if tails else None, packing, keep)
        mixed: dict[str, Tensor] = {}
        for name in "qkv":
            y = self.get_submodule(f"{name}_proj")(uses[name])
            if inputs.conv_size > 0:
                y, tail = self.get_submodule(f"{name}_conv1d")(y, tails.pop(0) if tails else None, packing, keep)
                kept.append(tail)
            mixed[name] = F.silu(y) if inputs.activation == "silu" else y
        kept.append(shifted)
        uses = {**mixed, "rate": uses["rate"], "decay": uses["decay"], "gate": uses["gate"], "values": uses["v"]}
        return uses, tuple(x for x in kept if x is not None)

    def _stream(self, uses: dict[str, Tensor], positions: Tensor, shared: dict[str, Tensor] | None) -> Stream:
        """What the memory is fed at each token: q [B, T, H, K], k and v [B, T * n, H, K], rates, decays and gates."""
        inputs, n, group = self.design.inputs, self._steps, self.num_heads // self.key_heads

        def heads(y: Tensor, width: int, steps: int, group: int) -> Tensor:
            y = y.unflatten(-1, (steps, -1, width)).flatten(1, 2)
            return y.repeat_interleave(group, 2) if group > 1 else y

        lr = log_decay = None
        gates: dict[str, Tensor] = {}
        if self.design.parametric:
            lr = self.b_proj(uses["rate"], positions)
            log_decay = self.a_proj(uses["decay"], positions) if inputs.decay is not None else None
            gates = {
                name: gate(uses["values" if name in self._own_gates else "rate"], positions)
                for name, gate in self.gate_projs.items()
            }
        projected = Stream(
            heads(uses["q"], self.key_dim, 1, group),
            heads(uses["k"], self.key_dim, n, group),
            heads(uses["v"], self.value_dim, n, 1),
            lr,
            log_decay,
            gates,
            positions,
            {} if shared is None else shared,
        )
        made = inputs.features(projected, self._numbers())
        return replace(made, q=made.q * made.q.shape[-1] ** -0.5) if inputs.features.scaled else made

    def _numbers(self) -> dict[str, Tensor]:
        return {} if self.features is None else self.features.values()

    def _read_out(self, out: Tensor, stream: Stream | None, x: Tensor) -> Tensor:
        """[B, T, H, V] -> [B, T, hidden_size]; without the stream, what the features would add from it is left out."""
        output = self.design.inputs.output
        gate = None
        if output.gate is not None:
            gate = GATE_ACTIVATIONS[output.gate](self.g_proj(x)).unflatten(-1, (self.num_heads, -1))

        def norm(y: Tensor) -> Tensor:
            y = y.to(x.dtype)
            if gate is not None and output.gate_first:
                y = y * gate
            return y if output.norm is None else self.o_norm(y)

        out = out.to(x.dtype)
        o = norm(out) if stream is None else self.design.inputs.features.read(out, stream, self._numbers(), norm)
        if gate is not None and not output.gate_first:
            o = o * gate
        return self.o_proj(o.flatten(2))

    def _weights(self) -> dict[str, Tensor]:
        if self.design.parametric:
            return self.memory.weights()
        if getattr(self.design.learning, "persistent", 0) == 0:
            return {}
        # Each token is a sequence of its own: it stands at position 0.
        tokens = self.persistent.tokens.unsqueeze(1)
        stream = self._stream(self._uses(tokens, None, None, keep=False)[0], _positions(tokens, None, None), None)
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
            key_dim, value_dim = self._memory_widths
            like_k = next(iter(like.memory.tensors())).new_zeros(num_rows, 1, self.num_heads, key_dim)
            k, v = like_k, like_k.new_zeros(num_rows, 1, self.num_heads, value_dim)
            empty = build_problem(
                k, k, v, design=self.design, weights=self._weights(), lr=k[..., 0], log_decay=None, gates={}
            )
            memory = empty.initial_state()
        return LayerState(conv, memory, seen)

    def explain(self) -> Any:
        """Which of the engine's paths this layer runs on, and why the others refuse."""
        weight, widths = self.o_proj.weight, self._memory_widths
        per_channel = self.design.parametric and self.design.inputs.per_channel
        return explain(self.design, device=weight.device, dtype=weight.dtype, per_channel=per_channel, widths=widths)

    @torch.no_grad()
    def inspect(self, hidden_states: Tensor, shared: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """What the memory does at each token of hidden_states [B, T, hidden_size], detached; a token loop, for short T.

        `shared` as in `forward`: what an earlier layer handed on at these tokens.

        lr, log_decay, and each gate by name: [B, T, H] (or [B, T, H, C]; with n micro-steps a token [B, T * n, ...])
        loss_before, loss_after: [B, T, H], the inner loss at (k_t, v_t) with W_{t-1} and with W_t, W = link(A)
        drift: [B, T, H], the Euclidean norm of A_t - A_0 over all weights

        Raises:
            ValueError: the design keeps no fast weights.
        """
        from miras.inspection import inspect_stream

        require(self.design.parametric, f"{self.design.learning.kind} keeps no fast weights: nothing to inspect")
        uses, _ = self._uses(hidden_states, None, None, keep=False)
        stream = self._stream(uses, _positions(hidden_states, None, None), shared)
        return inspect_stream(self.design, self._weights(), stream)

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, num_heads={self.num_heads}, head_dim={self.head_dim}"


SHIFTED = ("q", "k", "v", "decay", "rate", "gate")
"""Uses of the hidden state that a token shift tells apart: the projections, the gates, and the output's gate."""


def _width(name: str, ratio: float, head_dim: int) -> int:
    width = round(ratio * head_dim)
    require(
        width >= 1 and abs(width - ratio * head_dim) < 1e-6,
        f"{name}={ratio} times head_dim={head_dim} is {ratio * head_dim:g}; it must be a whole number of channels",
    )
    return width


def _positions(x: Tensor, past: LayerState | None, packing: Packing | None) -> Tensor:
    """[B, T], or [1, N] packed: each token's position from the start of its sequence, past calls included."""
    if packing is None:
        positions = torch.arange(x.shape[1]).unsqueeze(0)
        positions = positions if past is None else positions + past.seen.unsqueeze(1)
    else:
        positions = packing.position if past is None else packing.position + past.seen[packing.sequence]
        positions = positions.unsqueeze(0)
    return positions.to(x.device)
