"""The report: one file that needs nothing from outside, with the figures that the runs allow."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from miras import models
from miras.lm import MirasConfig, MirasForCausalLM
from miras.report import write_report
from miras.report.inspection import inspect_memory
from miras.report.page import _pieces
from miras.train.config import compared_recipe
from miras.train.run import train
from tests.train.conftest import _one_thread, _own_cache, corpus, tiny_recipe  # noqa: F401


def sections(html: str) -> set[str]:
    return set(re.findall(r'<section id="(\w+)"', html))


def test_report_is_one_file_with_every_figure(corpus: Path, tmp_path: Path) -> None:  # noqa: F811
    recipe = tiny_recipe(corpus, tmp_path / "run", "data.block_size=32", "sample.prompt='<b>the king'")
    main = train(recipe)
    other = train(compared_recipe(recipe, "transformer", main.parameters))
    out = tmp_path / "report.html"
    write_report([Path(main.folder), Path(other.folder)], out)
    html = out.read_text(encoding="utf-8")
    assert sections(html) == {"curves", "passage", "gates", "losses"}
    assert html.count("<svg") == 3
    assert not re.findall(r"(?:src|href)\s*=\s*[\"'](?!#)", html)
    assert not re.findall(r"url\((?!#)", html)
    assert "<script" not in html
    assert "@import" not in html
    for text in ("Yaad", "Transformer", f"{main.parameters:,}", f"{main.loss:.3f}", f"{other.loss:.3f}"):
        assert text in html
    assert "&lt;b&gt;the king" in html
    again = tmp_path / "again.html"
    write_report([Path(main.folder), Path(other.folder)], again)
    assert again.read_text(encoding="utf-8") == html


def test_a_model_without_fast_weights_is_reported_with_a_note(corpus: Path, tmp_path: Path) -> None:  # noqa: F811
    result = train(tiny_recipe(corpus, tmp_path / "run", "model.name=transformer", "train.steps=2"))
    write_report([Path(result.folder)], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert sections(html) == {"curves"}
    assert "Not shown: " in html


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no finished run"):
        write_report([tmp_path], tmp_path / "report.html")


class Layer(nn.Module):
    """Measures that are easy to tell apart; per-channel decay, and something that the report does not know."""

    def inspect(self, hidden_states: Tensor) -> dict[str, Tensor]:
        steps = torch.arange(hidden_states.shape[1]).float()
        heads = steps[None, :, None].expand(1, -1, 2)
        return {
            "lr": heads,
            "log_decay": -heads[..., None].expand(-1, -1, -1, 3),
            "loss_before": -heads,
            "other": heads,
        }

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


class Broken(Layer):
    def inspect(self, hidden_states: Tensor) -> dict[str, Tensor]:
        raise ValueError("keeps no fast weights")


class Model(nn.Module):
    """Two layers that can be inspected and one that cannot."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Broken(), Layer()])

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        hidden = input_ids[..., None].float()
        for i, layer in enumerate(self.layers):
            hidden = layer(hidden) if i else layer(hidden_states=hidden)
        return hidden


def test_inspection_keeps_what_it_can() -> None:
    found = inspect_memory(Model(), [5, 6, 7, 8])  # type: ignore[arg-type]
    assert [layer.name for layer in found.layers] == ["layers.0", "layers.2"]
    assert set(found.layers[0].measures) == {"lr", "log_decay", "loss_before"}
    assert found.layers[0].measures["log_decay"].tolist() == [[-t, -t] for t in range(4)]
    assert found.notes == ["layers.1: keeps no fast weights"]
    surprise = found.surprise()
    assert surprise is not None
    assert surprise.tolist() == pytest.approx([1.0, 2 / 3, 1 / 3, 0.0])


def test_layers_that_read_what_earlier_ones_share_are_inspected() -> None:
    config = MirasConfig(models.rwkv7(), vocab_size=20, hidden_size=16, num_hidden_layers=2, num_heads=2)
    found = inspect_memory(MirasForCausalLM(config), [5, 6, 7, 8])
    assert [layer.name for layer in found.layers] == ["model.layers.0.attn", "model.layers.1.attn"]
    assert found.notes == []


class Bytes:
    """A tokenizer of single bytes."""

    all_special_ids = (0,)

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def test_tokens_that_share_a_character_are_joined() -> None:
    ids = [0, *"aé".encode()]
    pieces = _pieces(Bytes(), ids, [0.0, 0.1, 0.2, 0.3])
    assert [(p.text, p.surprise) for p in pieces] == [("a", 0.1), ("é", 0.3)]


def test_metrics_of_a_killed_run_can_be_drawn(tmp_path: Path) -> None:
    from miras.report.page import _curve

    line = {"step": 1, "tokens": 10, "train_seconds": 0.5, "loss": 2.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(line)[:20])
    curve = _curve(tmp_path, "Yaad")
    assert curve.train.tolist() == [[10.0, 0.5, 2.0]]
    assert curve.validation.shape == (0, 3)
