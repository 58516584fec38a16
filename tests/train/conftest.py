"""A tiny corpus and a tiny recipe; every test has its own token cache."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from miras.train.config import Recipe, recipe_from

WORDS = ("the", "king", "and", "queen", "of", "all", "fair", "night", "do", "speak", "no", "more", "than", "words")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIRAS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def sentences(seed: int, count: int) -> str:
    """Lines of random words."""
    draw = random.Random(seed)
    return "".join(" ".join(draw.choices(WORDS, k=draw.randint(3, 9))) + ".\n" for _ in range(count))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder with six text files."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.txt").write_text(sentences(i, 40), encoding="utf-8")
    return folder


def tiny_recipe(corpus: Path, out: Path, *overrides: str) -> Recipe:
    """Seconds of training: a one-layer Yaad of width 16 on `corpus`."""
    raw = {
        "out": str(out),
        "model": {"name": "yaad", "hidden_size": 16, "num_hidden_layers": 1, "num_heads": 1, "intermediate_size": 16},
        "data": {"corpus": str(corpus), "vocab_size": 300, "block_size": 16, "holdout": 0.2},
        "train": {"steps": 8, "batch_size": 2, "threads": 1, "eval_every": 4, "save_every": 3, "logging_every": 1},
        "sample": {"prompt": "the king", "max_new_tokens": 4},
    }
    return recipe_from(raw, overrides)
