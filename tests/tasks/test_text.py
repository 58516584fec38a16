"""Text: windows are stretches of the corpus, held-out text stays apart, and a needle can be found by reading."""

import math
import re
import uuid
from dataclasses import replace

import numpy as np
import pytest
import torch

from miras.tasks import IGNORED, LanguageModelling, NumberNeedle, PassKeyNeedle, UuidNeedle
from miras.tasks.language import read_text
from tests.train.conftest import sentences

BYTES = 257
NEEDLES = [PassKeyNeedle, NumberNeedle, UuidNeedle]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Twelve documents, tokenised as bytes into a cache of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIRAS_CACHE", str(tmp_path_factory.mktemp("cache")))
        folder = tmp_path_factory.mktemp("corpus")
        for i in range(12):
            (folder / f"{i}.txt").write_text(sentences(i, 80).replace(".\n", ". "), encoding="utf-8")
        yield str(folder)


def texts_of(corpus):
    """The documents of either split, decoded from all of its tokens."""
    text = read_text(corpus, BYTES)
    return [text.tokenizer.decode(split.ids) for split in (text.train, text.validation)]


def language(corpus, **settings):
    return LanguageModelling(corpus=corpus, vocab_size=BYTES, num_tokens=32, **settings)


def test_windows_are_stretches_of_the_text_and_targets_are_what_comes_next(corpus):
    task = language(corpus)
    inputs, targets = task.sample(20, np.random.default_rng(0))
    train, held_out = texts_of(corpus)
    decode = read_text(corpus, BYTES).tokenizer.decode
    for row, target in zip(inputs, targets, strict=True):
        assert torch.equal(row[1:], target[:-1])
        assert decode([*row.tolist(), int(target[-1])]) in train
    held = task.tests()[""].sample(20, np.random.default_rng(0)).inputs
    assert all(decode(row) in held_out for row in held)


def test_held_out_documents_are_not_trained_on(corpus):
    train, held_out = (set(text.split("<|endoftext|>")) - {""} for text in texts_of(corpus))
    assert train and held_out and not train & held_out
    assert len(train) + len(held_out) == 12


def test_longer_tests_ask_for_their_last_tokens(corpus):
    task = language(corpus, longer=(2, 4))
    for factor, form in zip((1, 2, 4), task.tests().values(), strict=True):
        inputs, targets = form.sample(5, np.random.default_rng(0))
        assert form.split == "validation"
        assert inputs.shape == (5, 32 * factor)
        assert bool((targets[:, :-32] == IGNORED).all()) and bool((targets[:, -32:] != IGNORED).all())


def test_bits_a_byte_count_the_bytes_of_the_split(corpus):
    task = language(corpus).tests()[""]
    targets = task.sample(4, np.random.default_rng(0)).targets
    found = task.measure(torch.zeros(4, 32, BYTES), targets)
    nats, bits = (total / count for total, count in (found["loss"], found["bits a byte"]))
    assert task.metric == "loss" and not task.higher_is_better
    assert nats == pytest.approx(math.log(BYTES), rel=1e-5)
    # One separator a document, and a byte a token else.
    assert bits == pytest.approx(math.log2(BYTES), rel=0.02)
    assert task.tokens.text_bytes + len(task.tokens.starts) == len(task.ids)


def test_text_that_is_too_short_or_a_tokenizer_that_is_too_large_says_so(corpus, tmp_path):
    with pytest.raises(ValueError, match="num_tokens=100000, but the train split has only"):
        replace(language(corpus), num_tokens=100_000).sample(1, np.random.default_rng(0))
    read_text(corpus, BYTES).tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"vocab_size=100, but the tokenizer .* has 257 tokens; set it to 257"):
        LanguageModelling(corpus=corpus, vocab_size=100, tokenizer=str(tmp_path)).sample(1, np.random.default_rng(0))


def needle(kind, corpus, num_tokens=600, **settings):
    return kind(corpus=corpus, vocab_size=BYTES, num_tokens=num_tokens, **settings)


@pytest.mark.parametrize("kind", NEEDLES)
@pytest.mark.parametrize("form", ["", "1200 tokens", "training"])
def test_the_value_asked_for_stands_in_one_sentence_of_the_text(kind, form, corpus):
    task = needle(kind, corpus, longer=(2,))
    task = {**task.tests(), "training": task}[form]
    inputs, targets = task.sample(12, np.random.default_rng(0))
    decode = read_text(corpus, BYTES).tokenizer.decode
    values = set()
    assert inputs.shape == (12, task.num_tokens)
    for row, target in zip(inputs, targets, strict=True):
        value = decode(target[target != IGNORED]).strip()
        size = len(value) + 1
        assert target[:-size].eq(IGNORED).all()
        text = decode(row)
        word = "uuid" if kind is UuidNeedle else "number"
        [(key, told)] = re.findall(rf"One of the special magic {word}s for (\S+) is: (\S+)\.(?:\s|\w)", text)
        assert told == value and text.count(value) == 1
        assert text.startswith(f"A special magic {word} is hidden within the following text.")
        # The given part of the answer is all but its last byte.
        assert text.endswith(f"The special magic {word} for {key} mentioned in the provided text is {value[:-1]}")
        assert row[-size + 1 :].tolist() == target[-size:-1].tolist()
        values.add(value)
    assert len(values) == 12
    assert all(str(uuid.UUID(v)) == v and uuid.UUID(v).version == 4 for v in values if kind is UuidNeedle)
    assert all(10**6 <= int(v) < 10**7 for v in values if kind is not UuidNeedle)


def haystacks(task, corpus):
    """What stands around the needles of 40 examples: the text before and after."""
    decode = read_text(corpus, BYTES).tokenizer.decode
    for row in task.sample(40, np.random.default_rng(0)).inputs:
        text = decode(row).split("quiz you about the number afterwards.\n")[1].split("\nWhat is the special")[0]
        before, after = re.split(r"One of the special magic numbers for \S+ is: \d+\.", text)
        yield before, after


def test_prose_is_of_the_split_and_the_needle_stands_between_its_sentences(corpus):
    task = needle(NumberNeedle, corpus)
    train, held_out = texts_of(corpus)
    for form, text in ((task, train), (task.tests()[""], held_out)):
        places = []
        for before, after in haystacks(form, corpus):
            assert before[:-1] + after in text
            assert before == " " or before.endswith(". ")
            assert after.startswith((" ", "<|endoftext|>"))
            places.append(len(before) / len(before + after))
        assert min(places) < 0.2 and max(places) > 0.6


def test_noise_is_one_sentence_over_and_over(corpus):
    line = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
    for before, after in haystacks(needle(PassKeyNeedle, corpus), corpus):
        assert before == line * (len(before) // len(line))
        assert after[0] == "\n" and (line * 10).startswith(after[1:])


def test_whole_values_count_only_if_all_their_tokens_are_right(corpus):
    task = needle(NumberNeedle, corpus)
    targets = task.sample(4, np.random.default_rng(0)).targets
    outputs = torch.nn.functional.one_hot(targets.clamp(min=0), BYTES).float()
    assert task.measure(outputs, targets)["accuracy"] == (4, 4)
    outputs[0, -1].neg_()
    found = task.measure(outputs, targets)
    assert found["accuracy"] == (3, 4)
    assert found["token accuracy"] == (31, 32)
    assert found["loss"][1] == 32


@pytest.mark.parametrize("kind", NEEDLES)
def test_a_needle_that_cannot_fit_says_what_it_needs(kind, corpus):
    with pytest.raises(ValueError, match=r"num_tokens=256 is too short: needle and question take \d+ tokens"):
        needle(kind, corpus, 256).sample(1, np.random.default_rng(0))


def test_prose_that_is_too_short_says_so_and_noise_never_is(corpus):
    with pytest.raises(ValueError, match=r"num_tokens=200000, but the text of .* has \d+ tokens"):
        needle(NumberNeedle, corpus, 200_000).sample(1, np.random.default_rng(0))
    assert needle(PassKeyNeedle, corpus, 32_768).sample(1, np.random.default_rng(0)).inputs.shape == (1, 32_768)
