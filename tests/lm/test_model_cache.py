"""MirasCache: constant size, rows in any order, and no way back."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from lm_cases import DESIGNS, tokens

from miras import models
from miras.design import Design
from miras.lm import MirasCache, MirasForCausalLM

Build = Callable[..., MirasForCausalLM]


@pytest.mark.parametrize("name", DESIGNS)
def test_size_does_not_grow(name: str, build: Build) -> None:
    """It may change with the place in a segment, but two stretches of whole segments reach the same sizes."""
    model, cache = build(name), MirasCache()
    sizes = []
    for t in range(30):
        model(tokens(2, 1, seed=t), past_key_values=cache, use_cache=True)
        sizes.append(cache.nbytes)
    designs = [d for d in model.config.arrangement.designs if isinstance(d, Design)]
    whole = any(not d.parametric and d.learning.window is None for d in designs)
    if whole:  # softmax attention over everything, the one memory that keeps its tokens
        assert sizes[-1] - sizes[-2] == sizes[11] - sizes[10] > 0
    else:
        assert sizes[8:16] == sizes[16:24]
        assert min(sizes) > 0
    storage = sum(x.untyped_storage().nbytes() for slot in cache.layers for x in slot.state.tensors())
    assert storage <= 2 * cache.nbytes


RECURRENT = [name for name in models.NAMED if name != "transformer"]


@pytest.mark.parametrize("name", RECURRENT)
@torch.no_grad()
def test_decoding_stays_exact_and_keeps_nothing(name: str, build: Build) -> None:
    """After a prompt, 24 tokens one by one: the logits of one pass, and no more tensors or bytes at one window's end than
    at an earlier one (windows and segments of 4, sliding windows of 5)."""
    model, ids, cache = build(name), tokens(1, 32), MirasCache()
    expected = model(ids, use_cache=False).logits
    held = []
    gc.freeze()  # What was there before need not be looked through.
    for start, stop in [(0, 8), *((t, t + 1) for t in range(8, 32))]:
        logits = model(ids[:, start:stop], past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(logits, expected[:, start:stop], rtol=1e-9, atol=1e-9)
        if stop in (16, 32):
            gc.collect()
            held.append((sum(type(x) is torch.Tensor for x in gc.get_objects()), cache.nbytes))
    gc.unfreeze()
    assert held[0] == held[1]


@pytest.mark.parametrize("name", ["hybrid", "mac", "mag"])
def test_rows_can_be_picked_and_repeated(name: str, build: Build) -> None:
    model, x = build(DESIGNS[name]), tokens(3, 9)
    rows = torch.tensor([2, 0, 2])
    want = model(x[rows]).logits[:, 7:]
    cache = MirasCache(model.config)
    model(x[:, :7], past_key_values=cache, use_cache=True)
    assert cache.batch_size == 3
    cache.reorder_cache(rows)
    got = model(x[rows, 7:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    cache.batch_select_indices(torch.tensor([0]))
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 2


def test_reset(build: Build) -> None:
    model, x, cache = build(DESIGNS["huber"]), tokens(2, 5), MirasCache()
    first = model(x, past_key_values=cache, use_cache=True).logits
    cache.reset()
    assert cache.get_seq_length() == 0
    assert not cache.is_initialized
    assert cache.batch_size == -1
    assert torch.equal(model(x, past_key_values=cache, use_cache=True).logits, first)


def test_reading_without_writing(build: Build) -> None:
    model, x, cache = build(DESIGNS["huber"]), tokens(2, 6), MirasCache()
    model(x[:, :5], past_key_values=cache, use_cache=True)
    peeks = [model(x[:, 5:], past_key_values=cache, use_cache=False).logits for _ in range(2)]
    assert torch.equal(*peeks)
    assert cache.get_seq_length() == 5


def test_truncated_backpropagation(build: Build) -> None:
    model, x, cache = build(DESIGNS["huber"]).train(), tokens(2, 8), MirasCache()
    model(x[:, :4], past_key_values=cache, use_cache=True)
    cache.detach_()
    model(x[:, 4:], labels=x[:, 4:], past_key_values=cache, use_cache=True).loss.backward()
    assert model.model.layers[0].attn.memory.up.grad is not None


def test_no_way_back(build: Build) -> None:
    cache = MirasCache(build(DESIGNS["huber"]).config)
    cache.crop(0)
    with pytest.raises(NotImplementedError, match="constant size"):
        cache.crop(-1)
    with pytest.raises(NotImplementedError, match="constant size"):
        cache.activate_past_recording()
    assert not cache.is_croppable


def test_misuse(build: Build) -> None:
    from transformers import DynamicCache

    model = build(DESIGNS["huber"])
    with pytest.raises(TypeError, match="MirasCache, got DynamicCache"):
        model(tokens(2, 5), past_key_values=DynamicCache())
    cache = model(tokens(2, 5), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="holds 2 sequences, the batch has 3"):
        model(tokens(3, 1), past_key_values=cache)
