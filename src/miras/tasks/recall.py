"""Associative recall of tokens: many queries (MQAR), mixed difficulties, and keys that were told wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch

from miras.choice import require
from miras.tasks.common import require_counts, require_longer, require_share
from miras.tasks.task import IGNORED, Batch, Discrete

ZOOLOGY_VOCABULARY = 8192
ZOOLOGY_GRID = ((64, 4), (128, 8), (256, 16), (512, 64))
"""Tokens and pairs of arXiv 2312.04927, Fig. 2: a model is trained and tested on each."""
BASED_TRAINING = ((64, 4, 5), (128, 8, 1), (256, 16, 1), (256, 32, 1), (256, 64, 1))
"""Tokens, pairs and relative number of examples of arXiv 2402.18668, Fig. 2: one model is trained on all of them."""
BASED_TESTS = ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))


@dataclass(frozen=True)
class MQAR(Discrete):
    """Multi-query associative recall: pairs of key and value first, then every key once more; say its value.

    Keys are 1 .. vocab_size / 2 - 1, values vocab_size / 2 .. vocab_size - 1, token 0 in between. With few pairs chance is
    2 / vocab_size. `power` shapes the gaps between pairs and queries. Tests: `longer` times the tokens with `longer` times
    the pairs, as far as the vocabulary has keys.

    Source: zoology (arXiv 2312.04927), App. E, which draws values without replacement; here they may repeat.
    """

    source: ClassVar[str] = "arXiv 2312.04927, App. E"

    num_tokens: int = 128
    num_pairs: int = 12
    vocab_size: int = 64
    power: float = 0.01
    longer: tuple[int, ...] = (2, 4)

    def __post_init__(self) -> None:
        require_counts(num_tokens=self.num_tokens, num_pairs=self.num_pairs, vocab_size=self.vocab_size)
        require_longer(self.longer)
        slots = (self.num_tokens - 2 * self.num_pairs) // 2
        require(
            slots >= self.num_pairs,
            f"{self.num_tokens} tokens hold {self.num_pairs} pairs but only {slots} queries; need num_tokens >= 4 num_pairs",
        )
        require(
            self.num_keys >= self.num_pairs,
            f"vocab_size={self.vocab_size} has {self.num_keys} keys for {self.num_pairs} pairs; raise it",
        )
        require(self.power > 0, f"power={self.power}; must be positive (1 makes all gaps equally likely)")

    @property
    def num_keys(self) -> int:
        """How many tokens are keys."""
        return self.vocab_size // 2 - 1

    def sample(self, num_examples: int, rng: np.random.Generator) -> Batch:
        """The target at a query is its key's value."""
        pairs, half = self.num_pairs, self.vocab_size // 2
        slots = (self.num_tokens - 2 * pairs) // 2
        weight = self.power * np.arange(1, slots + 1) ** (self.power - 1)
        log_weight = np.log(weight / weight.sum())
        keys = 1 + rng.random((num_examples, half - 1)).argsort(1)[:, :pairs]
        values = rng.integers(half, self.vocab_size, (num_examples, pairs))
        # Gumbel keys draw slots without replacement with the given weights.
        gaps = (-(log_weight + rng.gumbel(size=(num_examples, slots)))).argsort(1)[:, :pairs]
        inputs = np.zeros((num_examples, self.num_tokens), dtype=np.int64)
        targets = np.full((num_examples, self.num_tokens), IGNORED, dtype=np.int64)
        inputs[:, 0 : 2 * pairs : 2], inputs[:, 1 : 2 * pairs : 2] = keys, values
        place = 2 * pairs + 2 * gaps
        np.put_along_axis(inputs, place, keys, axis=1)
        np.put_along_axis(targets, place, values, axis=1)
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets))

    def tests(self) -> Mapping[str, MQAR]:
        """The task itself, and longer forms with more pairs."""
        found = {"": self}
        for factor in self.longer:
            pairs = min(factor * self.num_pairs, self.num_keys)
            tokens = factor * self.num_tokens
            found[f"{tokens} tokens, {pairs} pairs"] = replace(self, num_tokens=tokens, num_pairs=pairs, longer=())
        return found


def zoology_grid() -> dict[str, MQAR]:
    """The four difficulties of zoology's Fig. 2, each a task of its own."""
    return {f"{n} tokens, {p} pairs": MQAR(n, p, ZOOLOGY_VOCABULARY, longer=()) for n, p in ZOOLOGY_GRID}


@dataclass(frozen=True)
class MQARMixture(Discrete):
    """MQAR of several difficulties: a batch is of one of them, drawn by its number of examples; tests reach beyond.

    `training` holds (tokens, pairs, relative number of examples), `testing` (tokens, pairs). Chance is 2 / vocab_size.

    Source: Based (arXiv 2402.18668), Fig. 2; its fillers between queries are random tokens, here they are token 0.
    """

    source: ClassVar[str] = "arXiv 2402.18668, Fig. 2"

    vocab_size: int = ZOOLOGY_VOCABULARY
    training: tuple[tuple[int, int, int], ...] = BASED_TRAINING
    testing: tuple[tuple[int, int], ...] = BASED_TESTS

    def __post_init__(self) -> None:
        require(len(self.training) > 0 and len(self.testing) > 0, "training and testing must each name a difficulty")
        for tokens, pairs, share in self.training:
            require_counts(share=share)
            self._task(tokens, pairs)
        for tokens, pairs in self.testing:
            self._task(tokens, pairs)

    def sample(self, num_examples: int, rng: np.random.Generator) -> Batch:
        """Examples of one difficulty of the training mixture."""
        shares = np.array([share for *_, share in self.training], dtype=np.float64)
        tokens, pairs, _ = self.training[int(rng.choice(len(shares), p=shares / shares.sum()))]
        return self._task(tokens, pairs).sample(num_examples, rng)

    def tests(self) -> Mapping[str, MQAR]:
        """Every difficulty of `testing`."""
        return {f"{tokens} tokens, {pairs} pairs": self._task(tokens, pairs) for tokens, pairs in self.testing}

    def _task(self, tokens: int, pairs: int) -> MQAR:
        return MQAR(tokens, pairs, self.vocab_size, longer=())


@dataclass(frozen=True)
class MajorityRecall(Discrete):
    """Every key is told `num_showings` times, in any order, and sometimes wrong; then say what was told most often.

    A showing is wrong with probability `noise`, then with any other value; of a key fewer than half are made wrong, so
    that the most frequent value is unique. With five showings that leaves 0.26 of them wrong for a noise of 0.3, and 0.34
    for 0.45. Keys are 0 .. num_keys - 1, values the `num_values` tokens above them.
    Chance is 1 / num_values. Tests: every share of `noises`, and `longer` times the showings.

    Source: MQAR (arXiv 2312.04927) with label noise, the setting that Miras (arXiv 2504.13173), Sec. 5.1, argues robust
    losses for.
    """

    source: ClassVar[str] = "arXiv 2504.13173, Sec. 5.1 (own form)"

    num_keys: int = 8
    num_values: int = 16
    num_showings: int = 5
    noise: float = 0.2
    noises: tuple[float, ...] = (0.0, 0.4)
    longer: tuple[int, ...] = (2, 4)

    def __post_init__(self) -> None:
        require_counts(num_keys=self.num_keys, num_showings=self.num_showings)
        require(self.num_values >= 2, f"num_values={self.num_values}; a wrong value needs at least 2")
        require_longer(self.longer)
        for noise in (self.noise, *self.noises):
            require_share(0.5, noise=noise)
            require(
                noise == 0 or self.num_showings >= 3,
                f"num_showings={self.num_showings} with a noise of {noise:g}; at least 3, that fewer than half can be wrong",
            )

    @property
    def vocab_size(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Keys and values."""
        return self.num_keys + self.num_values

    def sample(self, num_examples: int, rng: np.random.Generator) -> Batch:
        """Inputs key value key value ... then every key once; the target at a query is the majority's value."""
        shape = (num_examples, self.num_keys, self.num_showings)
        truth = rng.integers(0, self.num_values, shape[:2])
        # The first of a random order are wrong, at most half of them; the order of showings is mixed below.
        num_wrong = np.minimum(rng.binomial(self.num_showings, self.noise, shape[:2]), (self.num_showings - 1) // 2)
        wrong = np.arange(self.num_showings) < num_wrong[..., None]
        shift = np.where(wrong, rng.integers(1, self.num_values, shape), 0)
        told = (truth[..., None] + shift) % self.num_values
        order = rng.random((num_examples, self.num_keys * self.num_showings)).argsort(1)
        keys = np.take_along_axis(
            np.broadcast_to(np.arange(self.num_keys)[:, None], shape).reshape(num_examples, -1), order, 1
        )
        values = np.take_along_axis(told.reshape(num_examples, -1), order, 1)
        shown = np.stack([keys, self.num_keys + values], axis=2).reshape(num_examples, -1)
        queries = rng.random((num_examples, self.num_keys)).argsort(1)
        answers = self.num_keys + np.take_along_axis(truth, queries, 1)
        targets = np.concatenate([np.full_like(shown, IGNORED), answers], axis=1)
        return Batch(torch.from_numpy(np.concatenate([shown, queries], axis=1)), torch.from_numpy(targets))

    def tests(self) -> Mapping[str, MajorityRecall]:
        """The task itself, other shares of wrong showings, and longer forms."""
        plain = replace(self, noises=(), longer=())
        found = {"": self} | {f"noise {noise:g}": replace(plain, noise=noise) for noise in self.noises}
        return found | {
            f"{k * self.num_showings} showings": replace(plain, num_showings=k * self.num_showings) for k in self.longer
        }
