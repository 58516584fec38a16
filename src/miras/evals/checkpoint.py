"""Perplexity of a saved model, on its own held-out documents or on any corpus."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from miras.evals.perplexity import Score, score
from miras.train.config import DataSection, Recipe, read_recipe
from miras.train.corpus import open_corpus, whole_corpus
from miras.train.data import separator_id, tokenize
from miras.train.rows import Windows, stack


def evaluate_checkpoint(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: str | None = None,
    block_size: int | None = None,
    batch_size: int = 16,
) -> Score:
    """Score the run's held-out documents, or every document of `corpus`.

    Raises:
        ValueError: no corpus is given and the folder has no recipe that says what was held out.
    """
    recipe = find_recipe(folder)
    if recipe is None and corpus is None:
        raise ValueError(f"{folder} has no recipe.yaml to say what text was held out; give --data")
    data = DataSection() if recipe is None else recipe.data
    if corpus is not None:
        documents = whole_corpus(replace(data, corpus=corpus))
    else:
        documents = iter(open_corpus(data).validation())
    tokens = tokenize(documents, tokenizer)
    windows = Windows(tokens, block_size or data.block_size, data.isolate_documents, separator_id(tokenizer))
    return score(model, DataLoader(windows, batch_size, collate_fn=stack), windows.bytes_per_token)


def find_recipe(folder: Path) -> Recipe | None:
    """The recipe of a run folder or of a checkpoint inside one."""
    for place in (folder, folder.parent):
        if (place / "recipe.yaml").is_file():
            return read_recipe(place / "recipe.yaml")
    return None
