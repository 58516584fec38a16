"""Next-token prediction on windows of a long row of tokens: what language and DNA have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from miras.choice import require, require_one_of
from miras.tasks.common import require_counts, require_longer
from miras.tasks.task import IGNORED, Batch, Discrete


@dataclass(frozen=True)
class NextToken(Discrete, abstract=True):
    """The target at t is token t + 1, of windows at random places. Loss in nats a token; the perplexity is exp of it.

    Tests are held out, at the training length and at `longer` times it. The longer ones ask for their last num_tokens
    tokens only, so that lengths differ by what came before the tokens that count, not by how many had little before them.
    """

    metric: ClassVar[str] = "loss"
    higher_is_better: ClassVar[bool] = False
    unit: ClassVar[str] = "byte"
    splits: ClassVar[tuple[str, ...]] = ("train", "validation")
    """The last is the one of the tests."""

    num_tokens: int = 256
    split: str = "train"
    num_asked: int | None = None
    longer: tuple[int, ...] = (2, 4, 8, 16)

    def __post_init__(self) -> None:
        require_counts(num_tokens=self.num_tokens)
        require_one_of("split", self.split, self.splits)
        require_longer(self.longer)
        asked = self.num_asked
        require(
            asked is None or 1 <= asked <= self.num_tokens, f"num_asked={asked}; must be 1 to {self.num_tokens}, or None"
        )

    @property
    def ids(self) -> np.ndarray:
        """The split's tokens, in one row."""
        raise NotImplementedError

    @property
    def units_per_token(self) -> float:
        """How many units of the data (bytes, bases) a token of the split stands for."""
        return 1.0

    def sample(self, num_examples: int, rng: np.random.Generator) -> Batch:
        """Windows of the split, of which the last `num_asked` next tokens are asked for (None: all).

        Raises:
            ValueError: the split is shorter than a window and its last target.
        """
        ids, size = self.ids, self.num_tokens
        require(len(ids) > size, f"num_tokens={size}, but the {self.split} split has only {len(ids)} tokens; give fewer")
        begins = rng.integers(0, len(ids) - size, num_examples)
        rows = np.asarray(ids[begins[:, None] + np.arange(size + 1)], dtype=np.int64)
        targets = rows[:, 1:].copy()
        targets[:, : size - (self.num_asked or size)] = IGNORED
        return Batch(torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(targets))

    def tests(self) -> Mapping[str, Self]:
        """Held-out tokens at the training length and beyond it."""
        held_out = replace(self, split=self.splits[-1], longer=())
        asked = self.num_asked or self.num_tokens
        sizes = [factor * self.num_tokens for factor in self.longer]
        return {"": held_out} | {f"{n} tokens": replace(held_out, num_tokens=n, num_asked=asked) for n in sizes}

    def validation(self) -> Self:
        """Held-out tokens at the training length, apart from the tests' where the data have such a split."""
        split = "validation" if "validation" in self.splits else self.splits[-1]
        return replace(self, split=split, longer=())

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, tuple[float, int]]:
        """Accuracy, loss in nats a token, and bits a unit."""
        found = super().measure(outputs, targets)
        nats, count = found["loss"]
        return found | {f"bits a {self.unit}": (nats / math.log(2.0), round(count * self.units_per_token))}

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        """Perplexity a token."""
        return {"perplexity": math.exp(min(means["loss"], 700.0))}
