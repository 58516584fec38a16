"""The block of the language model: Llama's, with a memory layer in attention's place, or RWKV's or Mamba's around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from miras.arrangement import make_mixer
from miras.engine.problem import State
from miras.lm.config import MirasConfig
from miras.mixer import LayerCache
from miras.modules import TokenShift
from miras.packing import Packing


class GatedMLP(nn.Module):
    """SwiGLU: (silu(x gate) * (x up)) down."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> [..., hidden_size]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


@dataclass(frozen=True)
class ShiftState(State):
    """The last hidden state [B, 1, hidden_size] that a channel mix has seen."""

    tail: Tensor


class ChannelMix(nn.Module):
    """RWKV's MLP: relu(x' key)^2 value, x' = x_t + m (x_{t-1} - x_t). Source: RWKV-7 (arXiv 2503.14456) Sec. 4.2.

    `place` is where its last token is kept in a cache.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, place: int) -> None:
        super().__init__()
        self.place = place
        self.token_shift = TokenShift(hidden_size, ("key",))
        self.key = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.value = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        past_key_values: LayerCache | None = None,
        use_cache: bool = False,
        packing: Packing | None = None,
    ) -> Tensor:
        """[B, T, hidden_size], or [1, N, hidden_size] packed, to the same."""
        past = past_key_values.read(self.place) if past_key_values is not None else None
        assert past is None or isinstance(past, ShiftState)
        rows = packing.rows if packing is not None else None
        here = past if past is None or rows is None else past.index_select(rows)
        uses, tail = self.token_shift(x, None if here is None else here.tail, packing, use_cache)
        if past_key_values is not None and tail is not None:
            num_rows, num_tokens = packing.shape if packing is not None else x.shape[:2]
            state = ShiftState(tail)
            if rows is not None:
                blank = ShiftState(tail.new_zeros(num_rows, *tail.shape[1:]))
                state = (blank if past is None else past).put(rows, state)
            past_key_values.write(self.place, state, num_tokens)
        return self.value(F.relu(self.key(uses["key"])).square())


def make_norm(config: MirasConfig) -> nn.Module:
    """A norm of the backbone."""
    kind = nn.LayerNorm if config.norm == "layer" else nn.RMSNorm
    return kind(config.hidden_size, eps=config.norm_eps)


class OneToken(Protocol):
    """A faster way through a block for one token (see `miras.compile_decoding`)."""

    def __call__(self, hidden: Tensor, cache: LayerCache, shared: dict[str, Tensor] | None) -> Tensor | None:
        """What `MirasBlock.forward` gives for hidden [B, 1, hidden_size], writing the cache; None where it cannot run."""
        ...


class MirasBlock(GradientCheckpointingLayer):
    """x + memory(norm(x)), then x + MLP(norm(x)) if the configuration has one.

    `places` are those in a cache that it reads and writes.
    """

    step: OneToken | None = None

    def __init__(self, config: MirasConfig, layer_idx: int) -> None:
        super().__init__()
        width = config.intermediate_size
        assert width is not None
        earlier = [part for i in range(layer_idx) for part in config.layer_design(i).parts]
        self.attn_norm = make_norm(config)
        self.attn = make_mixer(
            config.layer_design(layer_idx),
            config.hidden_size,
            config.num_heads,
            head_dim=config.head_dim,
            norm_eps=config.norm_eps,
            layer_idx=layer_idx,
            first=not any(part.inputs.features.shares for part in earlier),
        )
        if config.mlp is not None:
            self.mlp_norm = make_norm(config)
        self.places = [layer_idx]
        if config.mlp == "swiglu":
            self.mlp = GatedMLP(config.hidden_size, width)
        elif config.mlp == "channel_mix":
            self.places.append(config.num_hidden_layers + layer_idx)
            self.mlp = ChannelMix(config.hidden_size, width, self.places[-1])
        self.config = config

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: LayerCache | None = None,
        use_cache: bool = False,
        packing: Packing | None = None,
        shared: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """[B, T, hidden_size], or [1, N, hidden_size] packed, to the same."""
        if self.step is not None and past_key_values is not None and use_cache and packing is None:
            done = self.step(hidden_states, past_key_values, shared)
            if done is not None:
                return done
        mixed, _, _ = self.attn(
            self.attn_norm(hidden_states),
            past_key_values=past_key_values,
            use_cache=use_cache,
            packing=packing,
            shared=shared,
        )
        hidden_states = hidden_states + mixed
        if self.config.mlp is None:
            return hidden_states
        if self.config.mlp == "swiglu":
            return hidden_states + self.mlp(self.mlp_norm(hidden_states))
        return hidden_states + self.mlp(self.mlp_norm(hidden_states), past_key_values, use_cache, packing)
