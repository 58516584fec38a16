"""The report's page: collects runs, draws the figures and fills one HTML template that needs nothing from outside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from miras.report.inspection import Inspection, inspect_memory

TEMPLATE = Path(__file__).with_name("report.html.jinja")
STYLE = Path(__file__).with_name("page.css")
PASSAGE_TOKENS = 1024
TITLES = {
    "gated_deltanet": "Gated DeltaNet",
    "deltanet": "DeltaNet",
    "linear_attention": "Linear attention",
    "titans_lmm": "Titans",
    "moneta_h": "Moneta-H",
    "yaad_h": "Yaad-H",
    "memora_h": "Memora-H",
}


@dataclass(frozen=True)
class Token:
    """A piece of the passage, with how much it surprised the memories (0 to 1)."""

    text: str
    surprise: float


def write_report(runs: Sequence[Path], out: Path) -> None:
    """Write the report on finished run folders, the main one first.

    Raises:
        ValueError: a folder holds no finished run.
        ImportError: matplotlib or jinja2 is missing; the message says how to get them.
    """
    try:
        from jinja2 import Environment

        from miras.report.figures import loss_curves, memory_gates, memory_losses
    except ImportError as error:
        raise ImportError("the report needs matplotlib and jinja2: pip install matplotlib jinja2") from error
    results = [_finished(run) for run in runs]
    labels = _labels([r.model for r in results], runs)
    inspection, pieces = _inspect(runs[0])
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    html = page.render(
        style=STYLE.read_text(encoding="utf-8"),
        results=results,
        main=results[0],
        labels=labels,
        compared=len(results) > 1,
        best={key: min(getattr(r, key) for r in results) for key in ("loss", "perplexity", "bits_per_byte")},
        fastest=max(r.tokens_per_second for r in results),
        curves=loss_curves([_curve(run, label) for run, label in zip(runs, labels, strict=True)]),
        gates=memory_gates(inspection),
        losses=memory_losses(inspection),
        passage=pieces,
        notes=inspection.notes,
        recipe=(runs[0] / "recipe.yaml").read_text(encoding="utf-8"),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html, encoding="utf-8")


def _finished(run: Path) -> Any:
    from miras.train.folder import read_result

    result = read_result(run)
    if result is None:
        raise ValueError(f"{run} holds no finished run (result.json is missing); finish it with miras train first")
    return result


def _labels(models: Sequence[str], runs: Sequence[Path]) -> list[str]:
    """Names for people; runs of one model are told apart by their folders."""
    names = [TITLES.get(model, model.capitalize()) for model in models]
    return [f"{name} ({run.name})" if names.count(name) > 1 else name for name, run in zip(names, runs, strict=True)]


def _curve(run: Path, label: str) -> Any:
    from miras.report.figures import Curve
    from miras.train.callbacks import read_metrics

    lines = read_metrics(run / "metrics.jsonl")

    def points(key: str) -> np.ndarray:
        rows = [[line["tokens"], line["train_seconds"], line[key]] for line in lines if key in line]
        return np.asarray(rows, np.float64).reshape(-1, 3)

    return Curve(label, points("loss"), points("eval_loss"))


def _inspect(run: Path) -> tuple[Inspection, list[Token]]:
    """The main model's memories on the beginning of the first held-out document, and that passage."""
    from transformers import AutoModelForCausalLM

    from miras.train.config import read_recipe
    from miras.train.data import load_tokenizer, prepare

    recipe = read_recipe(run / "recipe.yaml")
    validation = prepare(recipe.data).validation
    ids = [int(i) for i in validation.ids[: min(recipe.data.block_size, PASSAGE_TOKENS)]]
    inspection = inspect_memory(AutoModelForCausalLM.from_pretrained(str(run)), ids)
    surprise = inspection.surprise()
    if surprise is None:
        return inspection, []
    tokenizer = load_tokenizer(run)
    return inspection, _pieces(tokenizer, ids, surprise.tolist())


def _pieces(tokenizer: Any, ids: list[int], surprise: list[float]) -> list[Token]:
    """The passage token by token; tokens that share one character (bytes of it) are joined, the separator left out."""
    pieces: list[Token] = []
    waiting: list[int] = []
    for index, token in enumerate(ids):
        if token in tokenizer.all_special_ids:
            continue
        waiting.append(token)
        text = tokenizer.decode(waiting)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            pieces.append(Token(text, surprise[index]))
            waiting = []
    return pieces
