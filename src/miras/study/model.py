"""The model of a run: token ids or vectors in, answers at every position out, with as many parameters as every other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from miras.lm import MirasConfig, MirasForCausalLM, MirasModel
from miras.lm.config import further_arguments
from miras.tasks import Continuous, Discrete, Task
from miras.train.config import ModelSection
from miras.train.model import parameter_count, width_for


class TokenModel(nn.Module):
    """Token ids [N, T] to logits [N, T, vocab_size]: a causal language model whose labels are not shifted."""

    def __init__(self, config: MirasConfig) -> None:
        super().__init__()
        self.lm = MirasForCausalLM(config)

    def forward(self, inputs: Tensor) -> Tensor:
        """[N, T] -> [N, T, vocab_size]."""
        return self.lm(input_ids=inputs, use_cache=False).logits


class VectorModel(nn.Module):
    """Vectors [N, T, in_width] to vectors [N, T, out_width]: the language model's blocks between two linear maps."""

    def __init__(self, config: MirasConfig, in_width: int, out_width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(in_width, config.hidden_size)
        self.blocks = MirasModel(config)
        del self.blocks.embeddings  # No tokens come in, and none of their parameters should count.
        self.head = nn.Linear(config.hidden_size, out_width)

    def forward(self, inputs: Tensor) -> Tensor:
        """[N, T, in_width] -> [N, T, out_width]."""
        hidden = self.blocks(inputs_embeds=self.embed(inputs), use_cache=False).last_hidden_state
        return self.head(hidden)


def build(task: Task, design: Mapping[str, Any], size: Mapping[str, Any]) -> nn.Module:
    """The model, freshly initialised from torch's random state; `size` holds `intermediate_size` in place of `parameters`.

    Raises:
        ValueError: a design or sizes that are not legal, an unknown key in `extra`.
        TypeError: a task that is neither Discrete nor Continuous.
    """
    fields = {key: value for key, value in size.items() if key not in ("parameters", "extra")}
    fields |= further_arguments(size.get("extra", {}))
    if isinstance(task, Discrete):
        return TokenModel(MirasConfig(design=design, vocab_size=task.vocab_size, **fields))
    if isinstance(task, Continuous):
        return VectorModel(MirasConfig(design=design, vocab_size=1, **fields), task.in_width, task.out_width)
    raise TypeError(f"task {task.kind} is neither a Discrete nor a Continuous one")


def measures(task: Task) -> list[str]:
    """The metrics of a task, from one example and answers that are all zero."""
    targets = task.sample(1, np.random.default_rng(0)).targets
    width = task.vocab_size if isinstance(task, Discrete) else task.out_width if isinstance(task, Continuous) else 1
    sums = task.measure(torch.zeros(*targets.shape[:2], width), targets)
    means = {name: total / max(count, 1) for name, (total, count) in sums.items()}
    return [*means, *task.derived(means)]


def fitted(task: Task, design: Mapping[str, Any], size: Mapping[str, Any], label: str) -> dict[str, Any]:
    """The size with the `intermediate_size` at which the model has `parameters` parameters in all, as nearly as can be.

    Raises ValueError for a design that is not legal and for a size out of reach.
    """
    width = _width(json.dumps(task.to_dict()), json.dumps(design), json.dumps(size), label)
    return {**size, "intermediate_size": width}


@lru_cache(maxsize=4096)
def _width(task: str, design: str, size: str, label: str) -> int:
    asked, fields = Task.from_dict(json.loads(task)), json.loads(size)

    def count(width: int) -> int:
        with torch.device("meta"):
            return parameter_count(build(asked, json.loads(design), {**fields, "intermediate_size": width}))

    section = ModelSection(label, {}, fields["hidden_size"], fields["num_hidden_layers"], fields["num_heads"])
    return width_for(fields["parameters"], count, section)
