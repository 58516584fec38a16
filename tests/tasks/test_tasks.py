"""What holds of every task: examples by seed, serialisable settings, sums that add up, longer tests that are longer."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from miras import MirasConfig, MirasForCausalLM, models, tasks
from miras.tasks import IGNORED, Continuous, Discrete, Task

GENERATED = [
    tasks.MQAR(),
    tasks.MQARMixture(64, ((16, 2, 3), (32, 4, 1)), ((64, 8),)),
    tasks.MajorityRecall(),
    tasks.InContextRecall(),
    tasks.NoisyInContextRecall(),
    tasks.FuzzyInContextRecall(),
    tasks.SelectiveCopying(),
    tasks.Compression(),
    tasks.Memorization(),
    tasks.Parity(),
    tasks.GroupWords(3),
    tasks.GroupWords(5),
    tasks.VectorRecall(),
    tasks.Weather(),
]
FROM_FILES = [tasks.LanguageModelling(), tasks.DNA(), tasks.PassKeyNeedle(), tasks.NumberNeedle(), tasks.UuidNeedle()]
DISCRETE = [task for task in GENERATED if isinstance(task, Discrete)]


def kind(task):
    return f"{task.kind}{getattr(task, 'degree', '')}"


def draw(task, num_examples=8, seed=0):
    return task.sample(num_examples, np.random.default_rng(seed))


def test_every_task_of_the_package_is_here():
    found = {x for x in vars(tasks).values() if isinstance(x, type) and issubclass(x, Task)}
    assert {type(task) for task in GENERATED + FROM_FILES} == found - {Task, Discrete, Continuous}


@pytest.mark.parametrize("task", GENERATED + FROM_FILES, ids=kind)
def test_settings_go_through_json_and_name_a_source(task):
    for form in (task, *task.tests().values()):
        assert Task.from_dict(json.loads(json.dumps(form.to_dict()))) == form
    assert task.source
    assert "Source:" in type(task).__doc__ or "else as `Needle`" in type(task).__doc__


@pytest.mark.parametrize("task", GENERATED, ids=kind)
def test_examples_are_set_by_the_seed(task):
    one, two, other = draw(task), draw(task), draw(task, seed=1)
    assert torch.equal(one.inputs, two.inputs)
    assert torch.equal(one.targets.nan_to_num(), two.targets.nan_to_num())
    assert one.inputs.shape != other.inputs.shape or not torch.equal(one.inputs, other.inputs)


@pytest.mark.parametrize("task", DISCRETE, ids=kind)
def test_tokens_are_of_the_vocabulary_and_every_row_asks(task):
    for form in (task, *task.tests().values()):
        inputs, targets = draw(form)
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.shape == targets.shape
        asked = targets != IGNORED
        assert bool(asked.any(1).all())
        assert 0 <= int(inputs.min()) <= int(inputs.max()) < form.vocab_size
        assert 0 <= int(targets[asked].min()) <= int(targets[asked].max()) < form.vocab_size


@pytest.mark.parametrize("task", [t for t in DISCRETE if not isinstance(t, tasks.Parity | tasks.GroupWords)], ids=kind)
def test_no_answer_stands_at_its_own_position(task):
    inputs, targets = draw(task, 64)
    assert not bool((inputs == targets).any())


@pytest.mark.parametrize("task", [t for t in GENERATED if isinstance(t, Continuous)], ids=kind)
def test_vectors_have_the_widths_that_the_task_names(task):
    inputs, targets = draw(task)
    assert inputs.dtype == targets.dtype == torch.float32
    assert inputs.shape == (8, inputs.shape[1], task.in_width)
    assert targets.shape == (8, inputs.shape[1], task.out_width)
    assert bool(inputs.isfinite().all())
    assert bool((~targets.isnan()).flatten(1).any(1).all())


@pytest.mark.parametrize("task", GENERATED, ids=kind)
def test_tests_named_by_their_length_are_longer(task):
    length = draw(task, 1).inputs.shape[1]
    for label, form in task.tests().items():
        if label and not label.startswith(("noise", "outliers")) and not isinstance(task, tasks.MQARMixture):
            assert draw(form, 1).inputs.shape[1] > length
    if hasattr(task, "longer"):
        assert len(dataclasses.replace(task, longer=()).tests()) < len(task.tests())


@pytest.mark.parametrize("task", DISCRETE, ids=kind)
def test_measures_of_known_outputs(task):
    targets = draw(task, 16).targets
    right = torch.nn.functional.one_hot(targets.clamp(min=0), task.vocab_size).float()
    count = int((targets != IGNORED).sum())
    assert task.measure(right, targets)["accuracy"] == (count, count)
    flat = torch.zeros_like(right)
    assert float(task.loss(flat, targets)) == pytest.approx(math.log(task.vocab_size), rel=1e-5)
    nats, asked = task.measure(flat, targets)["loss"]
    assert nats / asked == pytest.approx(math.log(task.vocab_size), rel=1e-5)


@pytest.mark.parametrize("task", GENERATED, ids=kind)
def test_measures_of_batches_add_up(task):
    targets = draw(task, 6).targets
    outputs = torch.randn(*targets.shape[:2], task.vocab_size if isinstance(task, Discrete) else task.out_width)
    whole, first, last = (task.measure(outputs[a:b], targets[a:b]) for a, b in ((0, 6), (0, 2), (2, 6)))
    for name, (total, count) in whole.items():
        assert first[name][1] + last[name][1] == count
        assert first[name][0] + last[name][0] == pytest.approx(total, rel=1e-5)
    assert task.metric in whole


def test_an_error_of_vectors_is_over_what_is_asked():
    task = tasks.VectorRecall()
    targets = torch.tensor([[[1.0, 2.0], [float("nan"), float("nan")], [float("nan"), 4.0]]])
    outputs = torch.zeros(1, 3, 2, requires_grad=True)
    loss = task.loss(outputs, targets)
    assert loss.item() == pytest.approx((1 + 4 + 16) / 3)
    assert task.measure(outputs.detach(), targets)["error"] == (21.0, 3)
    loss.backward()
    assert outputs.grad.tolist()[0][1] == [0.0, 0.0]


BAD = [
    (tasks.MQAR, {"num_tokens": 20, "num_pairs": 8}, "need num_tokens >= 4 num_pairs"),
    (tasks.MQAR, {"vocab_size": 16}, "vocab_size=16 has 7 keys for 12 pairs; raise it"),
    (tasks.MQAR, {"power": 0.0}, "power=0.0; must be positive"),
    (tasks.MQAR, {"longer": (1,)}, r"longer=\(1,\); give whole factors"),
    (tasks.MQARMixture, {"training": ()}, "must each name a difficulty"),
    (tasks.MQARMixture, {"vocab_size": 64}, "raise it"),
    (tasks.MajorityRecall, {"noise": 0.5}, r"noise=0.5; must be at least 0 and below 0.5"),
    (tasks.MajorityRecall, {"num_values": 1}, "needs at least 2"),
    (tasks.InContextRecall, {"vocab_size": 15}, "vocab_size=15; must be even"),
    (tasks.InContextRecall, {"num_tokens": 2}, "needs at least 4"),
    (tasks.NoisyInContextRecall, {"noise": 1.0}, "noise=1.0; must be at least 0 and below 1"),
    (tasks.NoisyInContextRecall, {"vocab_size": 16}, "must be a whole number, at least 1"),
    (tasks.FuzzyInContextRecall, {"vocab_size": 6}, "vocab_size=6 has 2 key tokens; motifs of up to 3"),
    (tasks.FuzzyInContextRecall, {"num_tokens": 11}, "needs at least 12"),
    (tasks.FuzzyInContextRecall, {"key_sizes": ()}, "key_sizes is empty"),
    (tasks.SelectiveCopying, {"num_tokens": 32}, "num_copied=16 needs at least 33"),
    (tasks.SelectiveCopying, {"vocab_size": 3}, "must be at least 4"),
    (tasks.Compression, {"num_tokens": 1}, "must be at least 2"),
    (tasks.Memorization, {"vocab_size": 4}, "must be at least 5"),
    (tasks.Memorization, {"num_tokens": 31}, "num_tokens=31; must be even"),
    (tasks.Parity, {"num_tokens": 0}, "num_tokens=0; must be a whole number"),
    (tasks.GroupWords, {"degree": 7}, "degree=7; must be 2 to 6"),
    (tasks.VectorRecall, {"outliers": 1.0}, "outliers=1.0; must be at least 0 and below 1"),
    (tasks.VectorRecall, {"noises": (-1.0,)}, "noise=-1.0; must not be negative"),
    (tasks.VectorRecall, {"outlier_scale": 0.0}, "outlier_scale=0.0; must be positive"),
    (tasks.Weather, {"context": 168}, "context=168; must be 0 to 167"),
    (tasks.Weather, {"split": "future"}, "split='future'; allowed: 'train', 'validation', 'test'"),
    (tasks.LanguageModelling, {"split": "test"}, "split='test'; allowed: 'train', 'validation'"),
    (tasks.LanguageModelling, {"num_asked": 257}, "num_asked=257; must be 1 to 256, or None"),
    (tasks.DNA, {"num_tokens": 0.5}, "num_tokens=0.5; must be a whole number"),
    (tasks.NumberNeedle, {"split": "test"}, "split='test'; allowed"),
]


@pytest.mark.parametrize(("task", "settings", "message"), BAD, ids=lambda x: getattr(x, "__name__", None) or str(x)[:40])
def test_settings_that_no_example_could_follow_say_why(task, settings, message):
    with pytest.raises(ValueError, match=message):
        task(**settings)


def test_a_small_model_learns_the_facts():
    """Memorization asks nothing of a memory, so that it is what any model learns first."""
    torch.manual_seed(0)
    task, rng = tasks.Memorization(vocab_size=17, num_tokens=16), np.random.default_rng(0)
    config = MirasConfig(
        design=models.gated_deltanet(), vocab_size=task.vocab_size, hidden_size=32, num_hidden_layers=1, num_heads=1
    )
    model = MirasForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(50):
        inputs, targets = task.sample(32, rng)
        loss = task.loss(model(input_ids=inputs).logits, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    inputs, targets = task.sample(32, np.random.default_rng(1))
    with torch.no_grad():
        right, asked = task.measure(model(input_ids=inputs).logits, targets)["accuracy"]
    assert right / asked > 0.95
