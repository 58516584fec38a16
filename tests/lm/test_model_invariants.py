"""The whole model in float64: causality, padding, packing, caches and generation, over designs of every kind."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from lm_cases import DESIGNS, padded, tokens
from torch import Tensor

from miras.lm import MirasCache, MirasForCausalLM

Build = Callable[..., MirasForCausalLM]
LENGTH = 11
every_design = pytest.mark.parametrize("name", DESIGNS)


@every_design
def test_causality_to_the_bit(name: str, build: Build) -> None:
    model, x = build(name), tokens(2, LENGTH)
    before = model(x).logits
    for t in (0, 4, LENGTH - 1):
        changed = x.clone()
        changed[:, t] = (changed[:, t] + 1) % 23
        after = model(changed).logits
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.allclose(after[:, t], before[:, t])


@every_design
def test_rows_do_not_see_each_other(name: str, build: Build) -> None:
    model, x = build(name), tokens(3, LENGTH)
    together = model(x).logits
    apart = torch.cat([model(row[None]).logits for row in x])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-12)


@every_design
def test_an_early_token_is_remembered(name: str, build: Build) -> None:
    model, x = build(name), tokens(1, LENGTH)
    changed = x.clone()
    changed[0, 2] = (changed[0, 2] + 5) % 23
    reach = model(x).logits - model(changed).logits
    assert reach[0, 6].abs().max() > 1e-6


@every_design
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(name: str, side: str, build: Build) -> None:
    model = build(name)
    rows = [tokens(n, seed=n) for n in (3, LENGTH, 6)]
    ids, mask = padded(rows, side)
    logits = model(ids, attention_mask=mask).logits
    for i, row in enumerate(rows):
        alone = model(row[None]).logits[0]
        torch.testing.assert_close(logits[i][mask[i].bool()], alone, rtol=0, atol=1e-12)
    assert bool((logits[mask == 0] == 0).all())


def test_padding_in_the_middle_is_left_out(build: Build) -> None:
    model, x = build(DESIGNS["huber"]), tokens(1, 6)
    mask = torch.tensor([[1, 1, 0, 0, 1, 1]])
    logits = model(x, attention_mask=mask).logits
    alone = model(x[:, [0, 1, 4, 5]]).logits
    torch.testing.assert_close(logits[:, [0, 1, 4, 5]], alone, rtol=0, atol=1e-12)


@every_design
def test_packed_sequences_equal_separate_ones(name: str, build: Build) -> None:
    model = build(name)
    rows = [tokens(n, seed=n) for n in (5, 1, LENGTH, 4)]
    bounds = torch.tensor([0, 5, 6, 6 + LENGTH, 10 + LENGTH], dtype=torch.int32)
    packed = torch.cat(rows)[None]
    logits = model(packed, cu_seqlens=bounds).logits
    apart = torch.cat([model(row[None]).logits[0] for row in rows])
    torch.testing.assert_close(logits[0], apart, rtol=0, atol=1e-12)
    assert torch.equal(model(packed, cu_seq_lens_q=bounds).logits, logits)
    position_ids = torch.cat([torch.arange(len(row)) for row in rows])[None]
    assert torch.equal(model(packed, position_ids=position_ids).logits, logits)
    assert not torch.allclose(model(packed).logits, logits)


@every_design
def test_every_split_equals_one_call(name: str, build: Build) -> None:
    model, x = build(name), tokens(2, LENGTH)
    whole = model(x).logits
    for split in range(1, LENGTH):
        start = model(x[:, :split], use_cache=True)
        end = model(x[:, split:], past_key_values=start.past_key_values, use_cache=True)
        torch.testing.assert_close(torch.cat((start.logits, end.logits), 1), whole, rtol=0, atol=1e-9)
        assert end.past_key_values.get_seq_length() == LENGTH
    cache, pieces = MirasCache(), []
    for t in range(LENGTH):
        pieces.append(model(x[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-9)


@every_design
def test_left_padded_prefill_then_decode(name: str, build: Build) -> None:
    """Rows then stand at different places of the refresh window; in the second case's first call one row is empty."""
    model = build(name)
    rows = [tokens(n, seed=n) for n in (3, LENGTH, 6)]
    ids, mask = padded(rows, "left")
    alone = [model(row[None]).logits[0, -1] for row in rows]
    for borders in ([0, LENGTH - 2, LENGTH - 1, LENGTH], [0, 6, 9, LENGTH]):
        cache = MirasCache()
        for start, stop in itertools.pairwise(borders):
            part = ids[:, start:stop]
            logits = model(part, attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(logits[:, -1], torch.stack(alone), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["hybrid", "mac", "mag"])
def test_a_hidden_row_keeps_its_state(name: str, build: Build) -> None:
    model, x = build(DESIGNS[name]), tokens(2, LENGTH)
    cache = MirasCache()
    model(x[:, :6], past_key_values=cache, use_cache=True)
    only_first = torch.tensor([[1, 1], [0, 0]])
    model(x[:, 6:8], attention_mask=only_first, past_key_values=cache, use_cache=True)
    logits = model(x[:, 8:], past_key_values=cache, use_cache=True).logits
    second = model(torch.cat((x[1:, :6], x[1:, 8:]), 1)).logits
    torch.testing.assert_close(logits[0], model(x[:1]).logits[0, 8:], rtol=0, atol=1e-9)
    torch.testing.assert_close(logits[1], second[0, 6:], rtol=0, atol=1e-9)


@every_design
def test_gradients_reach_every_parameter(name: str, build: Build) -> None:
    model, x = build(name).train(), tokens(2, LENGTH)
    model(x, labels=x).loss.backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not bool((p.grad != 0).any())]
    assert not dead
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


@every_design
def test_gradients_through_padding_and_packing(name: str, build: Build) -> None:
    model = build(name)
    rows = [tokens(n, seed=n) for n in (4, 7)]
    weight = torch.randn(2, 7, 23, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def gradients(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, list(model.parameters())))

    apart = gradients(sum((model(row[None]).logits[0] * weight[i, : len(row)]).sum() for i, row in enumerate(rows)))
    ids, mask = padded(rows, "right")
    batch = gradients((model(ids, attention_mask=mask).logits * weight).sum())
    bounds = torch.tensor([0, 4, 11])
    flat = torch.cat((weight[0, :4], weight[1]))
    packed = gradients((model(torch.cat(rows)[None], cu_seqlens=bounds).logits[0] * flat).sum())
    for a, b, c in zip(apart, batch, packed, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(c, a, rtol=1e-9, atol=1e-9)


@every_design
def test_gradient_checkpointing_gives_the_same_gradients(name: str, build: Build) -> None:
    model, x = build(name).train(), tokens(2, LENGTH)
    plain = torch.autograd.grad(model(x, labels=x).loss, list(model.parameters()))
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    again = torch.autograd.grad(model(x, labels=x).loss, list(model.parameters()))
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
