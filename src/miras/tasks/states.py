"""State tracking: after every token, say the state that the tokens so far have led to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import ClassVar

import numpy as np
import torch

from miras.choice import require
from miras.tasks.common import require_counts, require_longer, with_longer
from miras.tasks.task import Batch, Discrete


@dataclass(frozen=True)
class Parity(Discrete):
    """Bits; after each of them, the parity of their sum so far. Chance is 1/2. Tests: `longer` times the tokens.

    Source: arXiv 2411.12537, which asks for the last parity only; here every position is asked.
    """

    source: ClassVar[str] = "arXiv 2411.12537"
    vocab_size = 2

    num_tokens: int = 40
    longer: tuple[int, ...] = (2, 4)

    def __post_init__(self) -> None:
        require_counts(num_tokens=self.num_tokens)
        require_longer(self.longer)

    def sample(self, num_examples: int, rng: np.random.Generator) -> Batch:
        """The target at t is the parity of tokens 0 .. t."""
        bits = rng.integers(0, 2, (num_examples, self.num_tokens))
        return Batch(torch.from_numpy(bits), torch.from_numpy(bits.cumsum(1) % 2))

    def tests(self) -> Mapping[str, Parity]:
        """The task itself and its longer forms."""
        return with_longer(self)


@dataclass(frozen=True)
class GroupWords(Discrete):
    """Permutations of `degree` things, one after another; after each, the one that they come to together.

    Tokens are the permutations in lexicographic order, 0 the identity; state_t(i) = token_t(state_{t-1}(i)). S3 is solvable,
    S5 is not: tracking it is NC1-complete. Chance is 1 / degree!. Tests: `longer` times the tokens.

    Source: arXiv 2404.08819, which proves this of S5 and trains on A5, A4 x Z5 and Z60; arXiv 2411.12537, which trains on
    S5, at times with fewer of its permutations.
    """

    source: ClassVar[str] = "arXiv 2404.08819; arXiv 2411.12537"

    degree: int = 3
    num_tokens: int = 32
    longer: tuple[int, ...] = (2, 4)

    def __post_init__(self) -> None:
        require(2 <= self.degree <= 6, f"degree={self.degree}; must be 2 to 6 (S6 has 720 permutations)")
        require_counts(num_tokens=self.num_tokens)
        require_longer(self.longer)

    @property
    def vocab_size(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The permutations."""
        return math.factorial(self.degree)

    def sample(self, num_examples: int, rng: np.random.Generator) -> Batch:
        """The target at t is the product of tokens 0 .. t."""
        table = _products(self.degree)
        words = rng.integers(0, len(table), (num_examples, self.num_tokens))
        states, state = np.empty_like(words), np.zeros(num_examples, dtype=np.int64)
        for t in range(self.num_tokens):
            state = states[:, t] = table[words[:, t], state]
        return Batch(torch.from_numpy(words), torch.from_numpy(states))

    def tests(self) -> Mapping[str, GroupWords]:
        """The task itself and its longer forms."""
        return with_longer(self)


@lru_cache
def _products(degree: int) -> np.ndarray:
    """table[a, b] is the index of the permutation that does b first and then a."""
    elements = np.array(list(permutations(range(degree))))
    weights = degree ** np.arange(degree)
    codes = elements @ weights
    order = codes.argsort()
    composed = elements[:, elements] @ weights
    return order[np.searchsorted(codes, composed, sorter=order)]
