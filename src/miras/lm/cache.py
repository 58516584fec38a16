"""The generation cache: one state of bounded size a layer (softmax attention without a window alone keeps every token)."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from miras.engine.problem import State

_NO_ROLLBACK = (
    "a Miras cache cannot go back to earlier tokens: the memory has learned from them, and its state has a constant "
    "size. There is no assisted generation, prompt lookup or cropping; keep a copy (copy.deepcopy) to return to"
)


class LayerSlot:
    """One layer's place in the cache: its state (None before the first token) and the columns it has been given."""

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False
    is_initialized = False

    def __init__(self) -> None:
        self.state: State | None = None
        self.num_tokens = 0

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.num_tokens = None, 0

    def get_seq_length(self) -> int:
        return self.num_tokens

    def get_max_length(self) -> int:
        return -1

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows, in a new order."""
        if self.state is not None:
            self.state = self.state.index_select(indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self.state is not None:
            self.batch_select_indices(torch.arange(self.state.rows).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            raise NotImplementedError(_NO_ROLLBACK)

    def activate_past_recording(self) -> None:
        raise NotImplementedError(_NO_ROLLBACK)


class MirasCache(Cache):
    """The states of a model's layers, for `past_key_values`; its size does not grow with the number of tokens seen.

    One row a sequence, each in its own phase of the refresh window. It does all that `generate` needs but go back to
    earlier tokens (assisted generation). `get_seq_length` counts columns with padding, as Hugging Face's caches do.

    >>> out = model(input_ids, past_key_values=MirasCache(), use_cache=True)
    """

    def __init__(self, config: object = None) -> None:
        super().__init__(layers=[LayerSlot() for _ in range(getattr(config, "num_hidden_layers", 0))])  # type: ignore[arg-type]

    @property
    def slots(self) -> list[LayerSlot]:
        """The layers' places, by layer index."""
        return self.layers  # type: ignore[return-value]

    def read(self, layer_idx: int) -> State | None:
        """The state of a layer, None before its first token."""
        return self.slots[layer_idx].state if layer_idx < len(self.layers) else None

    def write(self, layer_idx: int, state: State, num_tokens: int) -> None:
        """Keep a layer's state, `num_tokens` columns further on."""
        while len(self.slots) <= layer_idx:
            self.slots.append(LayerSlot())
        self.slots[layer_idx].state = state
        self.slots[layer_idx].num_tokens += num_tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns that a layer has been given."""
        return self.slots[layer_idx].num_tokens if layer_idx < len(self.slots) else 0

    @property
    def batch_size(self) -> int:
        """Number of rows, -1 before the first token."""
        return next((slot.state.rows for slot in self.slots if slot.state is not None), -1)

    @property
    def is_initialized(self) -> bool:
        """Whether any layer has seen a token."""
        return any(slot.state is not None for slot in self.slots)

    @property
    def nbytes(self) -> int:
        """Bytes held by the states."""
        return sum(slot.state.nbytes for slot in self.slots if slot.state is not None)

    def detach_(self) -> MirasCache:
        """Cut the states off from the graph, in place (truncated back-propagation through time)."""
        for slot in self.slots:
            if slot.state is not None:
                slot.state = slot.state.detach()
        return self
