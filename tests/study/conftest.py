"""Tiny tasks and a tiny study: a run is a fraction of a second."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from miras.study.config import Study, study_from
from miras.tasks import Batch, Continuous, Discrete


@dataclass(frozen=True)
class TinyEcho(Discrete):
    """Say the token again; tested at other lengths too."""

    vocab_size: int = 8
    num_tokens: int = 6
    lengths: tuple[int, ...] = (12,)

    def sample(self, num_examples: int, rng: np.random.Generator) -> Batch:
        tokens = torch.from_numpy(rng.integers(0, self.vocab_size, (num_examples, self.num_tokens)))
        return Batch(tokens, tokens)

    def tests(self) -> dict[str, "TinyEcho"]:
        return {"": self} | {f"{n} tokens": replace(self, num_tokens=n) for n in self.lengths}


@dataclass(frozen=True)
class TinySum(Continuous):
    """The mean of each vector's two numbers."""

    in_width: ClassVar[int] = 2
    out_width: ClassVar[int] = 1
    length: int = 4

    def sample(self, num_examples: int, rng: np.random.Generator) -> Batch:
        inputs = torch.from_numpy(rng.standard_normal((num_examples, self.length, 2), np.float32))
        return Batch(inputs, inputs.mean(-1, keepdim=True))


def raw_study(out: Path, **changes: Any) -> dict[str, Any]:
    """Two models, two seeds, four steps."""
    raw: dict[str, Any] = {
        "name": "tiny",
        "out": str(out),
        "seeds": [0, 1],
        "tasks": {"echo": {"kind": "TinyEcho"}},
        "models": {"Delta": {"name": "deltanet"}, "Transformer": {"name": "transformer"}},
        "size": {"hidden_size": 8, "num_hidden_layers": 1, "num_heads": 1, "parameters": 1500},
        "train": {"steps": 4, "batch_size": 4, "num_tests": 8, "lr": 1e-2},
    }
    return {**raw, **changes}


@pytest.fixture
def tiny(tmp_path: Path) -> Study:
    """The study of `raw_study` in a folder of its own."""
    return study_from(raw_study(tmp_path / "study"))
