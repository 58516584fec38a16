"""The benchmark of decoding at a tiny size: its rows, and that its options reach the models."""

from __future__ import annotations

import sys

import pytest
import torch

from tests.bench.scripts import script

SIZES = ["--width", "8", "--layers", "1", "--heads", "2", "--vocabulary", "16"]


def test_rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    decode = script("decode")
    options = ["--models", "transformer", "--contexts", "4", "12", "--threads", str(torch.get_num_threads())]
    monkeypatch.setattr(sys, "argv", ["decode", *options, *SIZES, "--dtype", "bfloat16"])
    decode.main()
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split("|")[1:4] for row in rows] == [[" transformer ", f" {n} ", " plain "] for n in (4, 12)]
    assert all(row.count("|") == head.count("|") for row in rows)


def test_sizes_of_the_models() -> None:
    model = script("decode").Kind(width=8, layers=1, heads=2, vocabulary=16, dtype="bfloat16").build("yaad")
    assert (model.config.hidden_size, model.config.num_hidden_layers, model.config.num_heads) == (8, 1, 2)
    assert model.get_input_embeddings().weight.shape == (16, 8)
    assert model.dtype == torch.bfloat16
