"""Perplexity: how well a model predicts held-out text, a token and a byte at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miras.stream import stream
from miras.train.rows import IGNORED, Tokens


@dataclass(frozen=True)
class Score:
    """Total negative log-likelihood `nats` of `tokens` predicted tokens that encode `text_bytes` bytes of text."""

    nats: float
    tokens: int
    text_bytes: float

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp(nats a token)."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """nats / (ln 2 * bytes): comparable across tokenizers."""
        return self.nats / (math.log(2.0) * self.text_bytes) if self.text_bytes else math.nan

    def to_dict(self) -> dict[str, float]:
        """All figures, for JSON."""
        return asdict(self) | {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
        }


@torch.no_grad()
def score(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    bytes_per_token: float,
    gather: Callable[[Tensor], Tensor] = lambda x: x,
    on_batch: Callable[[], Any] = lambda: None,
) -> Score:
    """Sum -log p(token | tokens before it in its row) over batches with input_ids and labels [B, T].

    Every row's first token is context only. `bytes_per_token` is that of the split, so that a part of it stands for
    the whole; `gather` collects [B, 2] over processes. The model is left in the mode it was in.
    """
    was_training = model.training
    model.eval()
    nats, tokens = 0.0, 0
    device = next(model.parameters()).device
    for batch in batches:
        input_ids, labels = batch["input_ids"].to(device), batch["labels"].to(device)
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].float()
        losses = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none")
        counted = (labels[:, 1:] != IGNORED).sum(1)
        sums = gather(torch.stack([losses.sum(1), counted.float()], dim=1))
        nats, tokens = nats + sums[:, 0].sum().item(), tokens + int(sums[:, 1].sum().item())
        on_batch()
    model.train(was_training)
    return Score(nats, tokens, tokens * bytes_per_token)


def score_whole(model: Any, tokens: Tokens, block: int = 2048) -> Score:
    """The same over all tokens as one document, each predicted from all before it, in memory that its length does not move.

    Source: `miras.stream`, whose block changes no figure.
    """
    nats = sum(losses.double().sum().item() for losses in stream(model, tokens.ids, block))
    return Score(nats, max(0, len(tokens) - 1), tokens.text_bytes)
