"""A tokenizer, tiny models and task files for tests of the harness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from miras import models
from miras.lm import MirasConfig, MirasForCausalLM
from miras.train.config import DataSection
from miras.train.corpus import Document
from miras.train.data import make_tokenizer

WORDS = "the king and the queen of all fair night do speak no more than words to me my lord what say you now"

QUESTIONS: list[dict[str, Any]] = [
    {"input": "the king", "choices": ["speaks to the queen", "no", "fair words of the night"], "answer": 1},
    {"input": "what say you, my lord, of all the fair words", "choices": ["more", "no more than the king"], "answer": 0},
    {"input": "do", "choices": ["speak", "speaks", "the the the the the the"], "answer": 2},
    {"input": "fair queen", "choices": ["of night", "of nights and kings"], "answer": 1},
    {"input": "no more words than the queen and the king", "choices": ["do", "say to me now"], "answer": 0},
]


def make(name: str, tokenizer: PreTrainedTokenizerBase) -> MirasForCausalLM:
    """A two-layer model in float64, of random weights large enough for distinct scores."""
    torch.manual_seed(0)
    changes = {} if name in ("transformer", "gated_deltanet") else {"refresh": 4}
    config = MirasConfig(
        design=models.named(name, **changes),
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_heads=2,
        intermediate_size=16,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.3,
    )
    return MirasForCausalLM(config).double()


def make_words_tokenizer() -> PreTrainedTokenizerBase:
    """Byte-level BPE that puts its separator before every text."""
    return make_tokenizer(DataSection(vocab_size=300), [Document("words", WORDS * 4)])


def write_multiple_choice(folder: Path, rows: list[dict[str, Any]] = QUESTIONS) -> None:
    """The task `questions`."""
    about = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{input}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    write_task(folder, "questions", rows, about)


def write_task(folder: Path, name: str, rows: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """A task of local files."""
    folder.mkdir(exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **files, **about}))


def log_likelihood(model: MirasForCausalLM, context: list[int], continuation: list[int]) -> float:
    """Of the continuation after the context, alone in its batch and with no padding, nats."""
    ids: Tensor = torch.tensor([context + continuation])
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0].double()
    log_p = logits - logits.exp().sum(-1, keepdim=True).log()
    start = len(context) - 1
    return sum(log_p[start + i, token].item() for i, token in enumerate(continuation))
