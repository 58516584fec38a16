"""A task: where training examples come from, on what it is tested, and what counts as right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from miras.choice import Choice

IGNORED = -100
"""Target where nothing is asked, of tokens; NaN in targets of numbers."""


class Batch(NamedTuple):
    """Examples: inputs [N, T] int64 or [N, T, width] float32; targets of the same kind, aligned with the inputs' positions.

    The model's output at position t answers targets[:, t]; nothing is shifted.
    """

    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Task(Choice, abstract=True):
    """Examples by seed, and what is measured on them.

    `source` names the paper and section. Two calls of `sample` with generators of the same seed give the same examples.
    """

    family: ClassVar[str] = "task"
    source: ClassVar[str] = ""
    metric: ClassVar[str] = ""
    """Name of the main number of `measure`, the one that tables show."""
    higher_is_better: ClassVar[bool] = True

    def sample(self, num_examples: int, rng: np.random.Generator) -> Batch:
        """Fresh examples of the training distribution."""
        raise NotImplementedError

    def tests(self) -> Mapping[str, Task]:
        """What the trained model is tested on, by condition: the task itself and, say, its longer or noisier forms."""
        return {"": self}

    def validation(self) -> Task:
        """What settings are selected on: by default the first condition of the tests, on other draws."""
        return next(iter(self.tests().values()))

    def references(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        """What a model has to beat, by name: functions from inputs to outputs, fitted to training data at most."""
        return {}

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean training loss over what is asked; outputs [N, T, out_width]."""
        raise NotImplementedError

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, tuple[float, int]]:
        """Per metric the sum over what is asked and how many were asked: batches add up."""
        raise NotImplementedError

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        """Metrics that follow from the means of `measure`, as a perplexity does."""
        return {}


class Discrete(Task, abstract=True):
    """Tokens in, tokens out: cross entropy in nats, and accuracy. Every kind has a `vocab_size`, a field or derived."""

    metric: ClassVar[str] = "accuracy"
    vocab_size: int

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, tuple[float, int]]:
        asked = targets != IGNORED
        given, wanted = outputs[asked], targets[asked]
        right = int((given.argmax(-1) == wanted).sum())
        nats = float(F.cross_entropy(given.float(), wanted, reduction="sum"))
        return {"accuracy": (right, len(wanted)), "loss": (nats, len(wanted))}


class Continuous(Task, abstract=True):
    """Vectors in, vectors out: mean squared error over the asked coordinates (targets that are not NaN).

    Every kind has an `in_width` and an `out_width`, fields or derived.
    """

    metric: ClassVar[str] = "error"
    higher_is_better: ClassVar[bool] = False
    in_width: int
    out_width: int

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        asked = ~targets.isnan()
        return (outputs[asked].float() - targets[asked]).square().mean()

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, tuple[float, int]]:
        asked = ~targets.isnan()
        return {"error": (float((outputs[asked].float() - targets[asked]).square().sum()), int(asked.sum()))}
