"""A model can be trained on multi-query associative recall, and is measured right."""

import numpy as np
import pytest
import torch
from torch import nn

from miras.evals.recall import Recipe, accuracy, solve
from miras.tasks import MQAR


class Lookup(nn.Module):
    """Answers by looking the pairs up: what a perfect memory does."""

    def __init__(self, task):
        super().__init__()
        self.task = task

    def forward(self, input_ids):
        logits = torch.zeros(*input_ids.shape, self.task.vocab_size)
        for row, tokens in enumerate(input_ids.tolist()):
            end = 2 * self.task.num_pairs
            pairs = dict(zip(tokens[0:end:2], tokens[1:end:2], strict=True))
            for t, token in enumerate(tokens):
                logits[row, t, pairs.get(token, 0)] = 1
        return type("Output", (), {"logits": logits})


def test_lookup_scores_one_and_a_constant_scores_chance():
    task = MQAR(num_tokens=64, num_pairs=8, vocab_size=32)
    inputs, targets = task.sample(64, np.random.default_rng(0))
    assert accuracy(Lookup(task), inputs, targets) == 1.0

    class Constant(nn.Module):
        def forward(self, input_ids):
            return type("Output", (), {"logits": torch.eye(32)[20].expand(*input_ids.shape, 32)})

    assert accuracy(Constant(), inputs, targets) == pytest.approx(1 / 16, abs=0.04)


def test_a_model_learns_a_small_task():
    torch.manual_seed(0)
    task = MQAR(num_tokens=8, num_pairs=1, vocab_size=8)

    class Two(nn.Module):
        """Attends to the token after an equal one: enough for one pair."""

        def __init__(self):
            super().__init__()
            self.value, self.head = nn.Embedding(8, 16), nn.Linear(16, 8)

        def forward(self, input_ids):
            same = (input_ids[:, :, None] == input_ids[:, None, :-1]).float().tril(-1)
            return type("Output", (), {"logits": self.head(same @ self.value(input_ids[:, 1:]))})

    result = solve(Two(), task, Recipe(steps=60, lr=3e-2, num_test=64))
    assert result.accuracy > 0.9
    assert result.losses[-1] < result.losses[0] / 4
    assert solve(Two(), task, Recipe(steps=2, num_test=8)).accuracy < 0.9


def test_a_loss_that_is_not_finite_stops():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.ones(1))

        def forward(self, input_ids):
            return type("Output", (), {"logits": self.p * torch.full((*input_ids.shape, 64), float("nan"))})

    with pytest.raises(FloatingPointError, match="step 0"):
        solve(Broken(), MQAR(), Recipe(steps=1))
