"""Recall of tokens and of vectors: every answer is found again from the inputs alone, by brute force."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from miras.tasks import (
    IGNORED,
    MQAR,
    MajorityRecall,
    MQARMixture,
    VectorRecall,
    mean_of_showings,
    median_of_showings,
    zoology_grid,
)
from miras.tasks.recall import BASED_TESTS


@pytest.mark.parametrize("task", [MQAR(40, 6, 32, longer=()), *MQAR(40, 6, 32).tests().values()], ids=str)
def test_mqar_asks_every_key_once_for_its_value(task):
    inputs, targets = task.sample(50, np.random.default_rng(0))
    end, half = 2 * task.num_pairs, task.vocab_size // 2
    asked = targets != IGNORED
    for row, ask, target in zip(inputs.tolist(), asked.tolist(), targets.tolist(), strict=True):
        answers = dict(zip(row[0:end:2], row[1:end:2], strict=True))
        assert len(answers) == task.num_pairs
        assert all(1 <= key < half <= value < task.vocab_size for key, value in answers.items())
        queries = {t: token for t, token in enumerate(row[end:], end) if token}
        assert sorted(queries.values()) == sorted(answers)
        assert [t for t, a in enumerate(ask) if a] == sorted(queries)
        assert all(target[t] == answers[key] for t, key in queries.items())


def test_mqar_gaps_follow_the_power_law():
    """With power 1 all slots are equally likely; with 0.01 the first is the likeliest by far."""
    even, steep = (MQAR(64, 1, 8, power=power).sample(4000, np.random.default_rng(0)).targets for power in (1.0, 0.01))
    first = [(targets[:, 2] != IGNORED).float().mean().item() for targets in (even, steep)]
    weight = np.arange(1, 32) ** -0.99
    assert first[0] == pytest.approx(1 / 31, abs=0.012)
    assert first[1] == pytest.approx(1 / weight.sum(), abs=0.03)


def test_mqar_longer_tests_have_more_pairs_as_far_as_there_are_keys():
    assert list(MQAR().tests()) == ["", "256 tokens, 24 pairs", "512 tokens, 31 pairs"]


def test_zoologys_difficulties():
    assert [(t.num_tokens, t.num_pairs, t.vocab_size) for t in zoology_grid().values()] == [
        (64, 4, 8192),
        (128, 8, 8192),
        (256, 16, 8192),
        (512, 64, 8192),
    ]
    mixture = MQARMixture()
    assert [(t.num_tokens, t.num_pairs) for t in mixture.tests().values()] == list(BASED_TESTS)
    assert max(t for t, *_ in mixture.training) < max(t for t, _ in mixture.testing)


def test_a_mixture_draws_its_difficulties_by_their_share():
    task, rng = MQARMixture(64, ((16, 2, 3), (32, 4, 1)), ((64, 8),)), np.random.default_rng(0)
    lengths = Counter(task.sample(1, rng).inputs.shape[1] for _ in range(400))
    assert set(lengths) == {16, 32}
    assert lengths[16] / 400 == pytest.approx(0.75, abs=0.08)


@pytest.mark.parametrize("task", [MajorityRecall(num_showings=4), *MajorityRecall().tests().values()], ids=str)
def test_the_majority_is_what_was_told_most_often(task):
    inputs, targets = task.sample(40, np.random.default_rng(0))
    told = 2 * task.num_keys * task.num_showings
    assert not bool((targets[:, :told] != IGNORED).any())
    for row, answers in zip(inputs.tolist(), targets[:, told:].tolist(), strict=True):
        keys, values, queries = row[0:told:2], row[1:told:2], row[told:]
        assert Counter(keys) == dict.fromkeys(range(task.num_keys), task.num_showings)
        assert sorted(queries) == list(range(task.num_keys))
        for query, answer in zip(queries, answers, strict=True):
            counts = Counter(v for k, v in zip(keys, values, strict=True) if k == query)
            assert counts[answer] > task.num_showings / 2


# Cutting at four wrong of nine takes less than 0.001 of the share; at two of five much: E[min(Binomial(5, noise), 2)] / 5.
@pytest.mark.parametrize(("num_showings", "noise", "share"), [(9, 0.1, 0.1), (5, 0.3, 0.2607), (5, 0.45, 0.3387)])
def test_the_share_of_wrong_showings(num_showings, noise, share):
    task = MajorityRecall(num_keys=10, num_showings=num_showings, noise=noise)
    inputs, targets = task.sample(200, np.random.default_rng(0))
    told = 2 * task.num_keys * task.num_showings
    wrong = 0
    for row, answers in zip(inputs.tolist(), targets[:, told:].tolist(), strict=True):
        truth = dict(zip(row[told:], answers, strict=True))
        wrong += sum(truth[k] != v for k, v in zip(row[0:told:2], row[1:told:2], strict=True))
    assert wrong / (200 * 10 * num_showings) == pytest.approx(share, abs=0.01)


def test_two_showings_cannot_be_wrong_in_part():
    with pytest.raises(ValueError, match=r"num_showings=2 with a noise of 0\.2; at least 3"):
        MajorityRecall(num_showings=2)
    MajorityRecall(num_showings=2, noise=0.0, noises=())


def taken_apart(task, num_examples=200):
    """Keys, told values and clean values of the queries, matched by their keys alone."""
    inputs, targets = task.sample(num_examples, np.random.default_rng(0))
    told = task.num_keys * task.num_showings
    keys, values = inputs[..., : task.key_width], inputs[..., task.key_width : -1]
    assert bool((inputs[:, :told, -1] == 0).all()) and bool((inputs[:, told:, -1] == 1).all())
    assert bool((values[:, told:] == 0).all()) and bool(targets[:, :told].isnan().all())
    same = (keys[:, told:, None] == keys[:, None, :told]).all(3)
    assert bool((same.sum(2) == task.num_showings).all())
    assert torch.allclose(keys.norm(dim=2), torch.ones(()))
    shown = torch.stack([values[n, :told][same[n, q]] for n in range(num_examples) for q in range(task.num_keys)])
    return shown, targets[:, told:].flatten(0, 1)


def test_vectors_are_told_with_the_noise_that_is_named():
    shown, clean = taken_apart(VectorRecall(noise=0.3))
    assert float((shown - clean[:, None]).std()) == pytest.approx(0.3, rel=0.01)
    assert float(clean.var()) == pytest.approx(1.0, rel=0.03)
    exact, clean = taken_apart(VectorRecall(noise=0.0))
    assert torch.equal(exact, clean[:, None].expand_as(exact))


def test_outliers_stand_in_the_values_place_as_often_as_named():
    shown, clean = taken_apart(VectorRecall(noise=0.0, outliers=0.2))
    gross = (shown != clean[:, None]).all(2)
    assert torch.equal(shown[~gross], clean[:, None].expand_as(shown)[~gross])
    assert float(gross.float().mean()) == pytest.approx(0.2, abs=0.015)
    assert float(shown[gross].std()) == pytest.approx(5.0, rel=0.02)
    # Not correlated with the value that they replace.
    assert abs(float((shown * clean[:, None])[gross].mean())) < 0.15


def error_of(task, baseline):
    inputs, targets = task.sample(200, np.random.default_rng(0))
    total, count = task.measure(baseline(task, inputs), targets)["error"]
    return total / count


def test_what_the_baselines_reach():
    """The mean of r showings has error noise^2 / r, and outliers ruin it; the median shrugs them off."""
    noisy = VectorRecall(noise=1.0)
    assert error_of(noisy, mean_of_showings) == pytest.approx(1 / 8, rel=0.03)
    assert error_of(noisy, median_of_showings) > error_of(noisy, mean_of_showings)
    spoilt = VectorRecall(noise=0.0, outliers=0.2)
    # share / r of the outliers' variance, and the mean pulled towards 0 by the share: E = s (25 + 1) / r + s^2 (1 - 1 / r).
    assert error_of(spoilt, mean_of_showings) == pytest.approx(0.2 * 26 / 8 + 0.04 * 7 / 8, rel=0.05)
    assert error_of(spoilt, median_of_showings) < 0.1
    assert error_of(spoilt, lambda task, inputs: torch.zeros(*inputs.shape[:2], task.value_width)) == pytest.approx(
        1, rel=0.03
    )


def test_vector_tests_sweep_the_corruptions_and_the_lengths():
    task = VectorRecall(noise=0.5, outliers=0.1)
    forms = task.tests()
    assert forms["outliers 0.3"] == replace(task, noise=0.0, outliers=0.3, noises=(), outlier_shares=(), longer=())
    assert (forms["noise 2"].noise, forms["noise 2"].outliers) == (2.0, 0.0)
    assert (forms["32 keys"].num_keys, forms["32 showings"].num_showings) == (32, 32)
