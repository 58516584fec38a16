"""A document of any length through a model, block by block, in memory that does not grow with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from miras.choice import require
from miras.lm import MirasCache


def stream(model: Any, ids: Tensor | np.ndarray, block: int = 2048, cache: MirasCache | None = None) -> Iterator[Tensor]:
    """-log p(token | all tokens before it), in nats, of one document or of several of the same length.

    Each block is one call that goes on from the states of the last, so that the losses are those of one forward pass over
    the whole, whatever the block, while no more than a block and the model's states is held. (Softmax attention without a
    window keeps every token's keys and values, in a stream too.)

        ids     [T] or [B, T]; a memory-mapped array is read block by block
        block   tokens a call: its logits, B * block * vocab_size numbers, are the largest thing in memory
        cache   an empty MirasCache, or one that has seen what stands before; it is written

    Yields losses [n] or [B, n] for each block; all together T - 1, as the first token only gives context. The model is in
    eval mode while a block is computed, and then in the mode that it was in.

    >>> nats = sum(losses.sum().item() for losses in miras.stream(model, ids))

    Raises:
        ValueError: ids that are empty or of another shape, or a block below 1.
    """
    require(block >= 1, f"block={block}; must be at least 1 token")
    require(ids.ndim in (1, 2) and min(ids.shape) >= 1, f"ids are {tuple(ids.shape)}; give [T] or [B, T], not empty")
    return _blocks(model, ids, block, MirasCache() if cache is None else cache)


def _blocks(model: Any, ids: Tensor | np.ndarray, block: int, cache: MirasCache) -> Iterator[Tensor]:
    last: Tensor | None = None
    for start in range(0, ids.shape[-1], block):
        here = _tensor(ids[..., start : start + block]).to(model.device)
        rows = here if here.dim() == 2 else here[None]
        logits = _logits(model, rows, cache)
        known = logits[:, :-1] if last is None else torch.cat((last, logits[:, :-1]), dim=1)
        targets = rows[:, 1:] if last is None else rows
        losses = F.cross_entropy(known.transpose(1, 2), targets, reduction="none")
        # A copy: a view would keep the whole block's logits.
        last = logits[:, -1:].clone()
        if losses.shape[1] > 0:
            yield losses if here.dim() == 2 else losses[0]


@torch.no_grad()
def _logits(model: Any, ids: Tensor, cache: MirasCache) -> Tensor:
    training = model.training
    model.eval()
    try:
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
    finally:
        model.train(training)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _tensor(ids: Tensor | np.ndarray) -> Tensor:
    return ids.long() if isinstance(ids, Tensor) else torch.from_numpy(ids.astype(np.int64))
