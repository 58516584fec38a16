"""Persistent memory: learned tokens that stand before every sequence and do not depend on it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from miras.modules import mark_no_weight_decay, reset


class PersistentTokens(nn.Module):
    """`tokens` [N, hidden_size], drawn from N(0, 1) as normalised hidden states are spread; no weight decay.

    Source: Titans (arXiv 2501.00663) Sec. 3.3, Eq. 19.
    """

    def __init__(self, num_tokens: int, hidden_size: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(num_tokens, hidden_size))
        reset(self)
        mark_no_weight_decay(self)

    def initial_values(self) -> dict[str, Tensor]:
        return {"tokens": torch.randn(self.tokens.shape)}
