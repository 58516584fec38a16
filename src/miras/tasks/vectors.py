"""In-context recall of vectors whose values are told with noise or with gross errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from miras.choice import require
from miras.tasks.common import require_counts, require_longer, require_share
from miras.tasks.task import Batch, Continuous


@dataclass(frozen=True)
class VectorRecall(Continuous):
    """Every key is told `num_showings` times, in any order, with a corrupted value; then say every key's clean value.

    Keys are random unit vectors [key_width], clean values normal of variance 1 [value_width]. A showing is
    value + noise * normal, or, with probability `outliers`, outlier_scale * normal in the value's place. A token is key,
    told value (zero at a query) and 1 at a query. The error is relative to the values' variance: saying 0 gives 1.
    `mean_of_showings` and `median_of_showings` say what can be reached without knowing the kind of corruption.
    Tests: every level of `noises` (without outliers) and share of `outlier_shares` (without noise), `longer` times the
    showings, and `longer` times the keys.

    Source: the robust losses of Miras (arXiv 2504.13173), Sec. 5.1, put to the test they are argued for (own form).
    """

    source: ClassVar[str] = "arXiv 2504.13173, Sec. 5.1 (own form)"

    num_keys: int = 8
    num_showings: int = 8
    key_width: int = 16
    value_width: int = 16
    noise: float = 0.5
    outliers: float = 0.0
    outlier_scale: float = 5.0
    noises: tuple[float, ...] = (0.0, 1.0, 2.0)
    outlier_shares: tuple[float, ...] = (0.1, 0.2, 0.3)
    longer: tuple[int, ...] = (2, 4)

    def __post_init__(self) -> None:
        require_counts(num_keys=self.num_keys, num_showings=self.num_showings)
        require_counts(key_width=self.key_width, value_width=self.value_width)
        for outliers in (self.outliers, *self.outlier_shares):
            require_share(outliers=outliers)
        for noise in (self.noise, *self.noises):
            require(noise >= 0, f"noise={noise}; must not be negative")
        require(self.outlier_scale > 0, f"outlier_scale={self.outlier_scale}; must be positive")
        require_longer(self.longer)

    @property
    def in_width(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Key, value and the mark of a query."""
        return self.key_width + self.value_width + 1

    @property
    def out_width(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The value."""
        return self.value_width

    def sample(self, num_examples: int, rng: np.random.Generator) -> Batch:
        """num_keys * num_showings told pairs, then num_keys queries, whose targets are the clean values."""
        count, told = self.num_keys, self.num_keys * self.num_showings
        keys = rng.standard_normal((num_examples, count, self.key_width))
        keys /= np.linalg.norm(keys, axis=2, keepdims=True)
        values = rng.standard_normal((num_examples, count, self.value_width))
        shown = np.tile(np.arange(count), self.num_showings) * np.ones((num_examples, 1), dtype=np.int64)
        order = np.concatenate([rng.permuted(shown, axis=1), rng.random((num_examples, count)).argsort(1)], axis=1)
        rows = np.arange(num_examples)[:, None]
        inputs = np.zeros((num_examples, told + count, self.in_width), dtype=np.float32)
        targets = np.full((num_examples, told + count, self.value_width), np.nan, dtype=np.float32)
        inputs[..., : self.key_width] = keys[rows, order]
        inputs[:, :told, self.key_width : -1] = self._corrupted(values[rows, order[:, :told]], rng)
        inputs[:, told:, -1] = 1.0
        targets[:, told:] = values[rows, order[:, told:]]
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets))

    def _corrupted(self, values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        noisy = values + self.noise * rng.standard_normal(values.shape)
        gross = self.outlier_scale * rng.standard_normal(values.shape)
        return np.where(rng.random((*values.shape[:2], 1)) < self.outliers, gross, noisy)

    def tests(self) -> Mapping[str, VectorRecall]:
        """The task itself, other corruptions, and longer forms."""
        plain = replace(self, noises=(), outlier_shares=(), longer=())
        found = {"": self}
        found |= {f"noise {x:g}": replace(plain, noise=x, outliers=0.0) for x in self.noises}
        found |= {f"outliers {x:g}": replace(plain, noise=0.0, outliers=x) for x in self.outlier_shares}
        found |= {
            f"{k * self.num_showings} showings": replace(plain, num_showings=k * self.num_showings) for k in self.longer
        }
        return found | {f"{k * self.num_keys} keys": replace(plain, num_keys=k * self.num_keys) for k in self.longer}


def mean_of_showings(task: VectorRecall, inputs: Tensor) -> Tensor:
    """Outputs [N, T, value_width] that answer a query by the mean of what its key was told: best against normal noise."""
    return _aggregate(task, inputs, lambda shown: shown.mean(1))


def median_of_showings(task: VectorRecall, inputs: Tensor) -> Tensor:
    """Outputs [N, T, value_width] that answer a query by the coordinates' median: robust against outliers."""
    return _aggregate(task, inputs, lambda shown: shown.quantile(0.5, dim=1))


def _aggregate(task: VectorRecall, inputs: Tensor, middle: Callable[[Tensor], Tensor]) -> Tensor:
    keys, values = inputs[..., : task.key_width], inputs[..., task.key_width : -1]
    told = task.num_keys * task.num_showings
    outputs = torch.zeros_like(values)
    for t in range(told, inputs.shape[1]):
        same = (keys[:, :told] == keys[:, t : t + 1]).all(2)
        outputs[:, t] = middle(values[:, :told][same].unflatten(0, (len(inputs), task.num_showings)))
    return outputs
