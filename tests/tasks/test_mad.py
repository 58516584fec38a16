"""MAD's tasks: every target is found again from the inputs alone, by brute force."""

from itertools import groupby

import numpy as np
import pytest
import torch

from miras.tasks import (
    IGNORED,
    Compression,
    FuzzyInContextRecall,
    InContextRecall,
    Memorization,
    NoisyInContextRecall,
    SelectiveCopying,
)


def forms(task):
    return [task, *task.tests().values()]


def rows(task, num_examples=40):
    inputs, targets = task.sample(num_examples, np.random.default_rng(0))
    return zip(inputs.tolist(), targets.tolist(), strict=True)


@pytest.mark.parametrize("task", [*forms(InContextRecall()), *forms(NoisyInContextRecall())], ids=str)
def test_recall_asks_for_the_value_of_every_key_that_came_before(task):
    half = (task.vocab_size - getattr(task, "noise_vocab", 0)) // 2
    for tokens, targets in rows(task):
        value_of, expected = {}, [IGNORED] * len(tokens)
        for t in range(0, len(tokens), 2):
            key, value = tokens[t : t + 2]
            if key >= 2 * half:
                assert value >= 2 * half
                continue
            assert key < half <= value < 2 * half
            if key in value_of:
                expected[t] = value_of[key]
                assert value == value_of[key]
            value_of[key] = value
        assert targets == expected
        assert targets[-2] != IGNORED


@pytest.mark.parametrize("noise", [0.0, 0.2, 0.8])
def test_the_share_of_noise(noise):
    task = NoisyInContextRecall(noise=noise, num_tokens=256)
    inputs, _ = task.sample(100, np.random.default_rng(0))
    # The last slot and one other are never noise.
    assert float((inputs[:, ::2] >= 16).float().mean()) == pytest.approx(noise * 126 / 128, abs=0.015)


@pytest.mark.parametrize("task", forms(FuzzyInContextRecall()), ids=str)
def test_fuzzy_recall_asks_for_all_tokens_of_a_value(task):
    half, pad = (task.vocab_size - 1) // 2, task.vocab_size - 1
    for tokens, targets in rows(task):
        whole = [*tokens, targets[-1]]
        body = [token for token in whole if token != pad]
        assert whole == [pad] * (len(whole) - len(body)) + body
        runs = [tuple(run) for _, run in groupby(body, key=lambda token: token < half)]
        value_of, expected = {}, [IGNORED] * (len(whole) - len(body))
        for key, value in zip(runs[::2], runs[1::2], strict=True):
            assert len(key) in task.key_sizes
            assert max(key) < half <= min(value)
            assert 1 <= len(value) <= task.value_size
            assert len(set(key)) == len(key) and len(set(value)) == len(value)
            expected += [IGNORED] * len(key) + (list(value) if key in value_of else [IGNORED] * len(value))
            assert value_of.setdefault(key, value) == value
        assert targets == expected[1:]


@pytest.mark.parametrize("task", forms(SelectiveCopying()), ids=str)
def test_selective_copying_gives_the_tokens_in_their_order(task):
    copy, blank = task.vocab_size - 1, task.vocab_size - 2
    for tokens, targets in rows(task):
        at = tokens.index(copy)
        assert tokens[at + 1 :] == [blank] * task.num_copied
        assert targets[: at + 1] == [IGNORED] * (at + 1)
        assert targets[at + 1 :] == [token for token in tokens[:at] if token != blank]
        assert len(tokens) == task.num_tokens


@pytest.mark.parametrize("task", forms(Compression()), ids=str)
def test_compression_gives_the_whole_row_again(task):
    for tokens, targets in rows(task):
        at = tokens.index(task.vocab_size - 1)
        assert at == task.num_tokens - 1
        assert targets == [IGNORED] * (at + 1) + tokens[:at]
        assert set(tokens[at + 1 :]) == {task.vocab_size - 2}


def test_memorization_asks_for_the_same_facts_whatever_the_seed_and_never_shows_them():
    task = Memorization()
    value_of = {}
    for seed in range(3):
        inputs, targets = task.sample(200, np.random.default_rng(seed))
        assert bool((inputs[:, 1::2] == 255).all())
        assert int(inputs[:, ::2].max()) < 127
        for key, value in zip(inputs[:, ::2].flatten().tolist(), targets[:, 1::2].flatten().tolist(), strict=True):
            assert value_of.setdefault(key, value) == value
    assert len(value_of) == len(set(value_of.values())) == 127
    assert min(value_of.values()) >= 127
    other = Memorization(facts_seed=1).sample(200, np.random.default_rng(0)).targets
    assert not torch.equal(other, task.sample(200, np.random.default_rng(0)).targets)
