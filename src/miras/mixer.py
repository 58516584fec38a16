"""What every sequence mixer shares: padding, packing and the cache around its `mix`."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from miras.choice import require
from miras.engine.problem import State
from miras.packing import Packing


class LayerCache(Protocol):
    """What a layer asks of a cache (`miras.MirasCache` is one)."""

    def read(self, layer_idx: int) -> State | None:
        """The state of a layer, None before its first token."""
        ...

    def write(self, layer_idx: int, state: State, num_tokens: int) -> None:
        """Keep a layer's state, `num_tokens` columns further on."""
        ...


class Mixer(nn.Module):
    """A sequence mixer [B, T, hidden_size] -> [B, T, hidden_size] with a state; `layer_idx` is its place in a cache."""

    layer_idx: int | None

    def mix(
        self,
        x: Tensor,
        past: Any = None,
        packing: Packing | None = None,
        keep: bool = False,
        shared: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, State | None]:
        """Outputs for x [B, T, hidden_size] (or packed, [1, N, hidden_size]) after `past`, and the state if `keep`."""
        raise NotImplementedError

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: LayerCache | None = None,
        use_cache: bool = False,
        cu_seqlens: Tensor | None = None,
        packing: Packing | None = None,
        shared: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None, LayerCache | None]:
        """hidden_states [B, T, hidden_size] -> (o [B, T, hidden_size], None, past_key_values).

        attention_mask   [B, T], 1 at real tokens: padding on any side is left out, and is zero in o. With a cache the
                         mask may go on to the left; its last T columns count.
        past_key_values  a cache; read where given, written where `use_cache` is set too
        cu_seqlens       [0, end of first, ..., T] for B = 1: separate sequences laid end to end
        packing          the same, ready made, for hidden states that are packed already (the model packs once)
        shared           what the features of the model's layers hand on to later ones, at the same tokens
        """
        if use_cache and past_key_values is None:
            raise ValueError("use_cache=True needs a cache: pass past_key_values=miras.MirasCache()")
        place = self.layer_idx
        if past_key_values is not None and place is None:
            raise ValueError("a layer that works with a cache needs its place in it: set layer_idx")
        past = past_key_values.read(place) if past_key_values is not None and place is not None else None
        x, padded = hidden_states, None
        if packing is None:
            packing = pack_rows(hidden_states, attention_mask, cu_seqlens)
            padded = packing if packing is not None and packing.tokens is not None else None
            x = hidden_states if padded is None else padded.pack(hidden_states)
        o, state = self.mix(x, past, packing, keep=use_cache, shared=shared)
        if state is not None and past_key_values is not None and place is not None:
            past_key_values.write(place, state, packing.shape[1] if packing else x.shape[1])
        return o if padded is None else padded.pad(o), None, past_key_values


def pack_rows(x: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None) -> Packing | None:
    """How the rows of x [B, T, ...] are packed: by a mask, by cu_seqlens, or not at all (None)."""
    require(x.shape[1] > 0, f"the sequence is empty: hidden states are {tuple(x.shape)}; give at least one token")
    if cu_seqlens is not None:
        require(attention_mask is None, "give attention_mask or cu_seqlens, not both: packed sequences have no padding")
        return Packing.from_cu_seqlens(cu_seqlens, x.shape[0], x.shape[1])
    return None if attention_mask is None else Packing.from_mask(attention_mask, x.shape[0], x.shape[1])
