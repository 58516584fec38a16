"""The benchmark of decoding at a tiny size: its rows, and that its options reach the models."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

FILE = Path(__file__).parents[2] / "benchmarks/decode.py"
SIZES = ["--width", "8", "--layers", "1", "--heads", "2", "--vocabulary", "16"]


def load() -> Any:
    spec = importlib.util.spec_from_file_location("decode", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["decode"] = module  # where its dataclass looks its annotations up
    spec.loader.exec_module(module)
    return module


def test_rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    decode = load()
    options = ["--models", "transformer", "--contexts", "4", "12", "--threads", str(torch.get_num_threads())]
    monkeypatch.setattr(sys, "argv", ["decode", *options, *SIZES, "--dtype", "bfloat16"])
    decode.main()
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split("|")[1:4] for row in rows] == [[" transformer ", f" {n} ", " plain "] for n in (4, 12)]
    assert all(row.count("|") == head.count("|") for row in rows)


def test_sizes_of_the_models() -> None:
    model = load().Kind(width=8, layers=1, heads=2, vocabulary=16, dtype="bfloat16").build("yaad")
    assert (model.config.hidden_size, model.config.num_hidden_layers, model.config.num_heads) == (8, 1, 2)
    assert model.get_input_embeddings().weight.shape == (16, 8)
    assert model.dtype == torch.bfloat16
