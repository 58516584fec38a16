"""The six synthetic tasks of MAD (arXiv 2403.17844), each with its baseline difficulty as defaults.

MAD trains recall on every next token and tests it on the answers; here both ask for the answers only. Where a task deviates
otherwise, its docstring says so. The tokens are MAD's: keys first, then values, then noise, then special tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
import torch

from miras.choice import require
from miras.tasks.common import require_counts, require_even, require_longer, require_share, with_longer
from miras.tasks.task import IGNORED, Batch, Discrete

PAPER = "arXiv 2403.17844"


@dataclass(frozen=True)
class InContextRecall(Discrete):
    """Pairs of key and value, every key with one value throughout an example; say the value wherever a key comes again.

    Keys are the first half of the vocabulary, values the second; both are drawn anew with every example. The last key is
    one of those before it. Chance is 2 / vocab_size. Tests: `longer` times the tokens.

    Source: MAD (arXiv 2403.17844), in its multi-query form.
    """

    source: ClassVar[str] = PAPER

    vocab_size: int = 16
    num_tokens: int = 128
    longer: tuple[int, ...] = (2, 4)

    def __post_init__(self) -> None:
        require_even(vocab_size=self.vocab_size - self._num_noise, num_tokens=self.num_tokens)
        require(self.num_tokens >= 4, f"num_tokens={self.num_tokens}; a key that comes again needs at least 4")
        require_longer(self.longer)

    @property
    def _num_noise(self) -> int:
        return 0

    def sample(self, num_examples: int, rng: np.random.Generator) -> Batch:
        """The target at a key that was told before is its value, which follows it."""
        half, slots = (self.vocab_size - self._num_noise) // 2, self.num_tokens // 2
        values = rng.integers(half, 2 * half, (num_examples, half))
        keys = rng.integers(0, half, (num_examples, slots))
        told = self._told(num_examples, slots, rng)
        rows = np.arange(num_examples)
        source = np.where(told[:, :-1], rng.random((num_examples, slots - 1)), -1.0).argmax(1)
        keys[:, -1] = keys[rows, source]
        seen = np.zeros((num_examples, half), dtype=bool)
        targets = np.full((num_examples, self.num_tokens), IGNORED, dtype=np.int64)
        inputs = np.empty_like(targets)
        for slot in range(slots):
            key, here = keys[:, slot], told[:, slot]
            answers = values[rows, key]
            inputs[:, 2 * slot], inputs[:, 2 * slot + 1] = key, answers
            targets[:, 2 * slot] = np.where(here & seen[rows, key], answers, IGNORED)
            seen[rows, key] |= here
        noise = rng.integers(2 * half, max(self.vocab_size, 2 * half + 1), inputs.shape)
        return Batch(torch.from_numpy(np.where(told.repeat(2, axis=1), inputs, noise)), torch.from_numpy(targets))

    def _told(self, num_examples: int, slots: int, rng: np.random.Generator) -> np.ndarray:
        """Which slots hold a pair [N, slots]; the last always does, and one before it."""
        return np.ones((num_examples, slots), dtype=bool)

    def tests(self) -> Mapping[str, Self]:
        """The task itself and its longer forms."""
        return with_longer(self)


@dataclass(frozen=True)
class NoisyInContextRecall(InContextRecall):
    """In-context recall in which a share `noise` of the slots for pairs holds two random tokens of a noise vocabulary.

    The last `noise_vocab` tokens are noise. Chance is 2 / (vocab_size - noise_vocab). Tests: every share of `noises`, and
    longer forms.

    Source: MAD (arXiv 2403.17844), in its multi-query form.
    """

    vocab_size: int = 32
    noise_vocab: int = 16
    noise: float = 0.2
    noises: tuple[float, ...] = (0.4, 0.6, 0.8)

    def __post_init__(self) -> None:
        require_counts(noise_vocab=self.noise_vocab)
        for noise in (self.noise, *self.noises):
            require_share(noise=noise)
        super().__post_init__()

    @property
    def _num_noise(self) -> int:
        return self.noise_vocab

    def _told(self, num_examples: int, slots: int, rng: np.random.Generator) -> np.ndarray:
        told = rng.random((num_examples, slots)) >= self.noise
        told[np.arange(num_examples), rng.integers(0, slots - 1, num_examples)] = True
        told[:, -1] = True
        return told

    def tests(self) -> Mapping[str, Self]:
        """The task itself, its longer forms and other shares of noise."""
        return {**super().tests(), **{f"noise {x:g}": replace(self, noise=x, noises=(), longer=()) for x in self.noises}}


@dataclass(frozen=True)
class FuzzyInContextRecall(Discrete):
    """In-context recall whose keys and values are motifs of several different tokens: say all tokens of the value.

    Keys have a length of `key_sizes`, values of 1 .. value_size tokens, each motif once. The last key is one of those before
    it; a row that the motifs do not fill begins with padding, the last token. Keys are the first half of the others, values
    the rest. Chance is about 2 / vocab_size. Tests: keys of the largest size only, as MAD does, and longer forms.

    Source: MAD (arXiv 2403.17844), in its multi-query form.
    """

    source: ClassVar[str] = PAPER

    vocab_size: int = 16
    num_tokens: int = 128
    key_sizes: tuple[int, ...] = (1, 2, 3)
    value_size: int = 3
    longer: tuple[int, ...] = (2, 4)

    def __post_init__(self) -> None:
        require_counts(vocab_size=self.vocab_size, value_size=self.value_size, num_tokens=self.num_tokens)
        require(len(self.key_sizes) > 0, "key_sizes is empty; give the lengths of keys, for example (1, 2, 3)")
        for size in self.key_sizes:
            require_counts(key_size=size)
        require_longer(self.longer)
        longest, half = max(self.key_sizes), (self.vocab_size - 1) // 2
        require(
            max(longest, self.value_size) <= half,
            f"vocab_size={self.vocab_size} has {half} key tokens; motifs of up to {max(longest, self.value_size)} different "
            "tokens need at least as many",
        )
        need = 2 * (longest + self.value_size)
        require(self.num_tokens >= need, f"num_tokens={self.num_tokens}; a key that comes again needs at least {need}")

    def sample(self, num_examples: int, rng: np.random.Generator) -> Batch:
        """The targets from the last token of a key that came before are the tokens of its value."""
        size = self.num_tokens + 1
        tokens = np.full((num_examples, size), self.vocab_size - 1, dtype=np.int64)
        asked = np.zeros((num_examples, size), dtype=bool)
        for row in range(num_examples):
            ids, ask = self._example(rng)
            tokens[row, size - len(ids) :], asked[row, size - len(ids) :] = ids, ask
        targets = np.where(asked, tokens, IGNORED)[:, 1:]
        return Batch(torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(targets))

    def _example(self, rng: np.random.Generator) -> tuple[list[int], list[bool]]:
        half, room = (self.vocab_size - 1) // 2, self.num_tokens + 1
        value_of: dict[tuple[int, ...], tuple[int, ...]] = {}
        ids: list[int] = []
        asked: list[bool] = []
        # The last pair must fit, whatever its sizes.
        while len(ids) <= room - 2 * (max(self.key_sizes) + self.value_size):
            key = _motif(0, half, int(rng.choice(self.key_sizes)), rng)
            known = key in value_of
            value = value_of.setdefault(
                key, _motif(half, self.vocab_size - 1, int(rng.integers(1, self.value_size + 1)), rng)
            )
            ids += [*key, *value]
            asked += [False] * len(key) + [known] * len(value)
        key = list(value_of)[int(rng.integers(len(value_of)))]
        value = value_of[key]
        return [*ids, *key, *value], [*asked, *(False for _ in key), *(True for _ in value)]

    def tests(self) -> Mapping[str, FuzzyInContextRecall]:
        """Keys of the largest size only, at the training length and beyond."""
        return with_longer(replace(self, key_sizes=(max(self.key_sizes),)))


def _motif(begin: int, end: int, size: int, rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(int(token) for token in begin + rng.permutation(end - begin)[:size])


@dataclass(frozen=True)
class SelectiveCopying(Discrete):
    """Tokens scattered among blanks, then the copy token: say the tokens in their order, one at each blank that follows.

    The last token of the vocabulary says copy, the one before it is the blank. Chance is 1 / (vocab_size - 2). Tests:
    `longer` times the tokens, with as many to copy.

    Source: MAD (arXiv 2403.17844). MAD never lets a blank follow the last of the scattered tokens; here it may.
    """

    source: ClassVar[str] = PAPER

    vocab_size: int = 16
    num_tokens: int = 256
    num_copied: int = 16
    longer: tuple[int, ...] = (2, 4)

    def __post_init__(self) -> None:
        require(self.vocab_size >= 4, f"vocab_size={self.vocab_size}; must be at least 4, since two tokens are special")
        require_counts(num_copied=self.num_copied)
        require_longer(self.longer)
        need = 2 * self.num_copied + 1
        require(self.num_tokens >= need, f"num_tokens={self.num_tokens}; num_copied={self.num_copied} needs at least {need}")

    def sample(self, num_examples: int, rng: np.random.Generator) -> Batch:
        """The targets of the last `num_copied` positions are the scattered tokens."""
        count, blank = self.num_copied, self.vocab_size - 2
        room = self.num_tokens - count - 1
        copied = rng.integers(0, blank, (num_examples, count))
        places = np.sort(rng.random((num_examples, room)).argsort(1)[:, :count], axis=1)
        inputs = np.full((num_examples, self.num_tokens), blank, dtype=np.int64)
        np.put_along_axis(inputs, places, copied, axis=1)
        inputs[:, room] = self.vocab_size - 1
        targets = np.full_like(inputs, IGNORED)
        targets[:, -count:] = copied
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets))

    def tests(self) -> Mapping[str, SelectiveCopying]:
        """The task itself and its longer forms."""
        return with_longer(self)


@dataclass(frozen=True)
class Compression(Discrete):
    """Random tokens, then the compression token: say them all again, one at each blank that follows.

    The last token of the vocabulary says compress, the last but one is the blank. Chance is 1 / (vocab_size - 2). The row is
    2 num_tokens long. Tests: `longer` times the tokens.

    Source: MAD (arXiv 2403.17844). MAD's separate decoder sees only the model's output at the compression token; here
    the model itself goes on from its memory, which is as narrow as its state and, for attention, not narrow at all.
    """

    source: ClassVar[str] = PAPER

    vocab_size: int = 16
    num_tokens: int = 32
    longer: tuple[int, ...] = (2, 4)

    def __post_init__(self) -> None:
        require(self.vocab_size >= 4, f"vocab_size={self.vocab_size}; must be at least 4, since two tokens are special")
        require(
            self.num_tokens >= 2, f"num_tokens={self.num_tokens}; must be at least 2, the last being the compression token"
        )
        require_longer(self.longer)

    def sample(self, num_examples: int, rng: np.random.Generator) -> Batch:
        """The targets of the last num_tokens - 1 positions are the first num_tokens - 1 tokens."""
        count = self.num_tokens - 1
        tokens = rng.integers(0, self.vocab_size - 2, (num_examples, count))
        inputs = np.full((num_examples, 2 * count + 1), self.vocab_size - 2, dtype=np.int64)
        inputs[:, :count], inputs[:, count] = tokens, self.vocab_size - 1
        targets = np.full_like(inputs, IGNORED)
        targets[:, count + 1 :] = tokens
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets))

    def tests(self) -> Mapping[str, Compression]:
        """The task itself and its longer forms."""
        return with_longer(self)


@dataclass(frozen=True)
class Memorization(Discrete):
    """Keys, each followed by a token that stands for its value: say the value, which no example ever shows.

    The facts are drawn once, by `facts_seed`, so that only a model's weights can hold them: training and test examples ask
    for the same ones. The last token of the vocabulary asks; keys are the first half of the others, values the rest.
    Chance is about 2 / vocab_size.

    Source: MAD (arXiv 2403.17844).
    """

    source: ClassVar[str] = PAPER

    vocab_size: int = 256
    num_tokens: int = 32
    facts_seed: int = 12345

    def __post_init__(self) -> None:
        require(self.vocab_size >= 5, f"vocab_size={self.vocab_size}; must be at least 5: two keys, two values, one to ask")
        require_even(num_tokens=self.num_tokens)

    @property
    def facts(self) -> np.ndarray:
        """The value of every key."""
        half = (self.vocab_size - 1) // 2
        return half + np.random.default_rng(self.facts_seed).permutation(self.vocab_size - 1 - half)[:half]

    def sample(self, num_examples: int, rng: np.random.Generator) -> Batch:
        """Inputs key ask key ask ...; the target at ask is the value of the key before it."""
        facts = self.facts
        keys = rng.integers(0, len(facts), (num_examples, self.num_tokens // 2))
        inputs = np.full((num_examples, self.num_tokens), self.vocab_size - 1, dtype=np.int64)
        targets = np.full_like(inputs, IGNORED)
        inputs[:, ::2], targets[:, 1::2] = keys, facts[keys]
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets))
