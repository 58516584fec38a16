"""Compiled decoding gives what the blocks give, where it can run, and is out of the way elsewhere."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from lm_cases import DESIGNS, padded, tokens
from torch import Tensor, nn

import miras
from miras.design import Pattern
from miras.kernels.graph import Untraceable, compiled_graph
from miras.lm import MirasCache, MirasForCausalLM, compile_decoding, decoding

Build = Callable[..., MirasForCausalLM]
T, PROMPT = 14, 5


def able(name: str) -> bool:
    design = DESIGNS[name]
    designs = design.designs if isinstance(design, Pattern) else (design,)
    return any(decoding.unfit(part) is None for part in designs)


ABLE = [name for name in DESIGNS if able(name)]
QUICK = ("huber", "momentum", "signed_kl", "settling", "two_steps", "per_channel", "hybrid", "moneta", "rwkv7", "ttt_mlp")


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps as traced graphs, run operation by operation: the same but for the compiler, in a tenth of the time."""
    monkeypatch.setattr(decoding, "compiled_graph", lambda step, examples, compiled: compiled_graph(step, examples, False))


@torch.no_grad()
def decode(model: MirasForCausalLM, ids: Tensor, prompt: int = PROMPT) -> tuple[Tensor, MirasCache]:
    """Logits [B, T, V], the tokens after the prompt one by one."""
    cache = MirasCache()
    bounds = [0, *range(prompt, ids.shape[1] + 1)]
    parts = [model(ids[:, a:b], past_key_values=cache, use_cache=True).logits for a, b in pairwise(bounds)]
    return torch.cat(parts, 1), cache


def kinds(model: MirasForCausalLM) -> list[int]:
    """Graphs that each block has."""
    return [0 if block.step is None else len(block.step.graphs) for block in model.model.layers]


def assert_same_cache(found: MirasCache, expected: MirasCache) -> None:
    for a, b in zip(found.slots, expected.slots, strict=True):
        assert a.num_tokens == b.num_tokens
        for x, y in zip(a.state.tensors(), b.state.tensors(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ABLE])
@pytest.mark.usefixtures("traced")
def test_every_design(name: str, build: Build) -> None:
    model, ids = build(name), tokens(2, T)
    expected, cache = decode(model, ids)
    compile_decoding(model)
    found, moved = decode(model, ids)
    assert max(kinds(model)) in (1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found, model(ids).logits, rtol=1e-9, atol=1e-9)
    assert_same_cache(moved, cache)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "length"),
    [("huber", 7), *(pytest.param(name, T, marks=pytest.mark.slow) for name in ("moneta", "gated_delta"))],
)
def test_compiled(name: str, length: int, build: Build) -> None:
    """By default one block within one window, whose only graph takes seconds to compile."""
    model, ids = build(name, num_hidden_layers=1), tokens(1, length)
    expected, _ = decode(model, ids, prompt=4)
    compile_decoding(model)
    found, _ = decode(model, ids, prompt=4)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert kinds(model) == [1 if name in ("huber", "gated_delta") else 2]


@pytest.mark.usefixtures("traced")
def test_rows_at_different_places_of_their_windows(build: Build) -> None:
    """Windows of 4: rows 2 and 3 tokens on end theirs apart, and run compiled between."""
    model = build("huber")
    rows = [tokens(n, seed=n) for n in (2, 3)]
    ids, mask = padded(rows, "left")
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    compile_decoding(model)
    assert torch.equal(model.generate(ids, **options), expected)
    assert kinds(model) == [1, 1]


@pytest.mark.usefixtures("traced")
def test_beams_and_inference_mode(build: Build) -> None:
    model, ids = build("huber"), tokens(2, 7)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "num_beams": 3}
    expected = model.generate(ids, **options)
    compile_decoding(model)
    with torch.inference_mode():
        assert torch.equal(model.generate(ids, **options), expected)
    assert kinds(model) == [2, 2]


@pytest.mark.usefixtures("traced")
def test_gradients_autocast_and_training_run_as_before(build: Build) -> None:
    model, ids = build("huber"), tokens(1, 6)
    compile_decoding(model)
    cache = MirasCache()
    model(ids[:, :5], past_key_values=cache, use_cache=True)
    model(ids[:, 5:], past_key_values=cache, use_cache=True).logits.sum().backward()
    assert float(model.model.layers[0].attn.memory.up.grad.abs().max()) > 0
    with torch.no_grad():
        model(ids[:, 5:], past_key_values=cache, use_cache=False)
        with torch.autocast("cpu", torch.bfloat16):
            decode(model.float(), ids)
        decode(model.train(), ids)
    assert kinds(model) == [0, 0]


@pytest.mark.usefixtures("traced")
def test_parameters_and_dtypes_may_change(build: Build) -> None:
    model, ids = build("huber"), tokens(1, T)
    compile_decoding(model)
    decode(model, ids)
    other = {name: x + 0.1 for name, x in model.state_dict().items()}
    model.load_state_dict(other, assign=True)
    plain = copy.deepcopy(model)
    assert plain.model.layers[0].step is None
    torch.testing.assert_close(decode(model, ids)[0], decode(plain, ids)[0], rtol=1e-9, atol=1e-9)
    assert kinds(model) == [2, 2]
    torch.testing.assert_close(decode(model.float(), ids)[0], decode(plain.float(), ids)[0], rtol=1e-4, atol=1e-4)
    assert kinds(model) == [4, 4]


@pytest.mark.usefixtures("traced")
def test_blocks_that_are_alike_share_graphs(build: Build) -> None:
    model = build(miras.Pattern((DESIGNS["huber"], DESIGNS["momentum"])), num_hidden_layers=4)
    compile_decoding(model)
    steps = [block.step for block in model.model.layers]
    assert steps[0].graphs is steps[2].graphs is not steps[1].graphs
    assert steps[1].graphs is steps[3].graphs


@pytest.mark.usefixtures("traced")
def test_a_pickled_model_is_whole(build: Build) -> None:
    model, ids = build("huber"), tokens(1, T)
    compile_decoding(model)
    expected, _ = decode(model, ids)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    torch.testing.assert_close(decode(loaded, ids)[0], expected, rtol=1e-9, atol=1e-9)


def test_what_is_refused(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="softmax attention has a state that grows or slides"):
        compile_decoding(build("transformer"))
    with pytest.raises(ValueError, match="a memory and softmax attention together"):
        compile_decoding(build("mac"))
    with pytest.raises(ValueError, match="no MirasBlock"):
        compile_decoding(nn.Linear(2, 2))
    monkeypatch.setattr(decoding, "has_compiler", lambda: False)
    with pytest.raises(ValueError, match=r"no C\+\+ compiler"):
        compile_decoding(build("huber"))


def test_a_step_that_cannot_be_traced(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("no such operation")

    model = build("huber")
    compile_decoding(model)
    monkeypatch.setattr(decoding, "compiled_graph", broken)
    with pytest.raises(Untraceable, match=r"cannot be compiled here: no such operation"):
        decode(model, tokens(1, T))
    assert model.model.layers[0].step is not None
