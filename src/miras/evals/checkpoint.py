"""Perplexity of a saved model, on its own held-out documents or on any corpus."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from miras.evals.perplexity import Score, score, score_whole
from miras.lm import MirasForCausalLM
from miras.train.config import DataSection, Recipe, read_recipe
from miras.train.corpus import Document, open_corpus, whole_corpus
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


def evaluate_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: Path, block: int = 2048) -> Score:
    """Score a UTF-8 text file as one document, however long, in blocks that go on from one another.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty or not UTF-8, or the model keeps no Miras states.
    """
    if not text.is_file():
        raise FileNotFoundError(f"no text file at {text}")
    if not isinstance(model, MirasForCausalLM):
        raise ValueError(f"a {type(model).__name__} keeps no states of constant size to stream with; leave --stream out")
    try:
        content = text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{text} is not a UTF-8 text file") from error
    if not content.strip():
        raise ValueError(f"{text} is empty")
    return score_whole(model, tokenize([Document(text.name, content)], tokenizer), block)


def find_recipe(folder: Path) -> Recipe | None:
    """The recipe of a run folder or of a checkpoint inside one."""
    for place in (folder, folder.parent):
        if (place / "recipe.yaml").is_file():
            return read_recipe(place / "recipe.yaml")
    return None
