"""State tracking against products of permutations written as plain functions."""

from itertools import permutations

import numpy as np
import pytest

from miras.tasks import GroupWords, Parity


@pytest.mark.parametrize("task", Parity().tests().values(), ids=str)
def test_parity(task):
    inputs, targets = task.sample(20, np.random.default_rng(0))
    assert inputs.shape == (20, task.num_tokens)
    for bits, states in zip(inputs.tolist(), targets.tolist(), strict=True):
        assert states == [sum(bits[: t + 1]) % 2 for t in range(len(bits))]
    assert 0.4 < float(inputs.float().mean()) < 0.6


@pytest.mark.parametrize("degree", [2, 3, 4, 5])
def test_states_are_products_of_permutations(degree):
    task = GroupWords(degree, longer=(3,))
    elements = list(permutations(range(degree)))
    assert task.vocab_size == len(elements)
    for form in task.tests().values():
        inputs, targets = form.sample(5, np.random.default_rng(0))
        for word, states in zip(inputs.tolist(), targets.tolist(), strict=True):
            things = list(range(degree))
            for token, state in zip(word, states, strict=True):
                things = [elements[token][thing] for thing in things]
                assert elements[state] == tuple(things)


def test_every_permutation_is_drawn():
    inputs, targets = GroupWords(5).sample(300, np.random.default_rng(0))
    assert len(inputs.unique()) == len(targets.unique()) == 120
