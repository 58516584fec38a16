"""generate(): cached and uncached agree for greedy search, sampling and beams, with and without left padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lm_cases import DESIGNS, padded, tokens

from miras.lm import MirasCache, MirasForCausalLM

Build = Callable[..., MirasForCausalLM]
every_design = pytest.mark.parametrize("name", DESIGNS)
NEW = 6


def generate(model: MirasForCausalLM, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=NEW, pad_token_id=0, **{"do_sample": False, **kwargs})


@every_design
def test_greedy(name: str, build: Build) -> None:
    model, x = build(name), tokens(2, 7)
    cached = generate(model, x)
    assert cached.shape == (2, 7 + NEW)
    assert torch.equal(cached, generate(model, x, use_cache=False))
    assert torch.equal(cached, generate(model, x, prefill_chunk_size=3))
    for t in range(7, 7 + NEW):
        assert torch.equal(model(cached[:, :t]).logits[:, -1].argmax(-1), cached[:, t])


@every_design
def test_left_padded_batch(name: str, build: Build) -> None:
    model = build(name)
    rows = [tokens(n, seed=n) for n in (2, 9, 5)]
    ids, mask = padded(rows, "left")
    together = generate(model, ids, attention_mask=mask)
    assert torch.equal(together, generate(model, ids, attention_mask=mask, prefill_chunk_size=3))
    for i, row in enumerate(rows):
        assert torch.equal(together[i, 9:], generate(model, row[None])[0, len(row) :])


@pytest.mark.parametrize("name", ["huber", "gated_delta", "hybrid", "mac", "mag"])
def test_beam_search(name: str, build: Build) -> None:
    model, x = build(name), tokens(2, 7)
    cached = generate(model, x, num_beams=3)
    assert torch.equal(cached, generate(model, x, num_beams=3, use_cache=False))
    ids, mask = padded([tokens(n, seed=n) for n in (2, 7)], "left")
    plain = generate(model, ids, attention_mask=mask, num_beams=3, use_cache=False)
    assert torch.equal(plain, generate(model, ids, attention_mask=mask, num_beams=3))


def test_sampling(build: Build) -> None:
    model, x = build(DESIGNS["huber"]), tokens(2, 7)
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        drawn.append(generate(model, x, do_sample=True, num_return_sequences=2, use_cache=use_cache))
    assert drawn[0].shape == (4, 7 + NEW)
    assert torch.equal(*drawn)


def test_from_embeddings(build: Build) -> None:
    model, x = build(DESIGNS["huber"]), tokens(2, 7)
    new = generate(model, None, inputs_embeds=model.get_input_embeddings()(x))
    assert torch.equal(new, generate(model, x)[:, 7:])


def test_going_on_from_a_cache(build: Build) -> None:
    model, x = build(DESIGNS["hybrid"]), tokens(2, 7)
    cache = MirasCache()
    first = generate(model, x, past_key_values=cache)
    longer = torch.cat((first, tokens(2, 3, seed=9)), 1)
    assert torch.equal(generate(model, longer, past_key_values=cache), generate(model, longer))


def test_no_assisted_generation(build: Build) -> None:
    model, x = build(DESIGNS["huber"]), tokens(1, 7)
    with pytest.raises(ValueError, match="stateful"):
        generate(model, x, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="cache_implementation"):
        generate(model, x, cache_implementation="static")
