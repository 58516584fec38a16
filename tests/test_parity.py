"""Each named model's whole layer against the one typed from its own paper (tests/papers_*.py), outputs and all gradients.

float64, 1e-9. Sizes are small, parameters random, so that nothing is at a neutral value; the sequence ends in the middle of
a window and has two whole ones in it where the model has windows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from miras import models
from miras.design import Design
from miras.layer import MemoryLayer
from tests import papers_deep as deep
from tests import papers_matrix as matrix
from tests.problems import assert_close, probe

HIDDEN, HEADS, TOKENS = 12, 2, 11

Paper = Callable[..., Any]

CASES: dict[str, tuple[Design, Paper, dict[str, Any]]] = {
    "linear_attention": (models.linear_attention(), matrix.linear_attention, {}),
    "linear_attention, normalised": (models.linear_attention(True), matrix.linear_attention, {"normalizer": True}),
    "retnet": (models.retnet(), matrix.retnet, {}),
    "lightning_attention": (models.lightning_attention(), matrix.lightning_attention, {}),
    "gla": (models.gla(), matrix.gla, {}),
    "mamba2": (models.mamba2(), matrix.mamba2, {}),
    "hgrn2": (models.hgrn2(), matrix.hgrn2, {}),
    "hgrn2, bounded": (models.hgrn2(0.3), matrix.hgrn2, {"lower_bound": 0.3}),
    "deltanet": (models.deltanet(), matrix.deltanet, {}),
    "deltanet, negative": (models.deltanet(True), matrix.deltanet, {"negative_eigenvalues": True}),
    "gated_deltanet": (models.gated_deltanet(), matrix.gated_deltanet, {}),
    "kda": (models.kda(), matrix.kda, {}),
    "deltaproduct": (models.deltaproduct(), matrix.deltaproduct, {}),
    "deltaproduct, 3": (models.deltaproduct(3), matrix.deltaproduct, {"n": 3}),
    "gated_deltaproduct": (models.gated_deltaproduct(), matrix.gated_deltaproduct, {}),
    "gated_deltaproduct, 3": (models.gated_deltaproduct(3), matrix.gated_deltaproduct, {"n": 3}),
    "longhorn": (models.longhorn(), matrix.longhorn, {}),
    "longhorn_diagonal": (models.longhorn_diagonal(), matrix.longhorn_diagonal, {}),
    "rwkv7": (models.rwkv7(), lambda *args: matrix.rwkv7(*args)[0], {}),
    "ttt_linear": (models.ttt_linear(refresh=4), deep.ttt_linear, {"refresh": 4}),
    "ttt_mlp": (models.ttt_mlp(refresh=4), deep.ttt_mlp, {"refresh": 4}),
    "omeganet": (models.omeganet(refresh=4), deep.omeganet, {"refresh": 4, "maximum": 0.5}),
    "omeganet, 2": (models.omeganet(2, refresh=4), deep.omeganet, {"refresh": 4, "window": 2}),
    "atlas": (models.atlas(refresh=4), deep.atlas, {"refresh": 4, "maximum": 0.25}),
}
"""{name: (design, the paper's layer, its options)}."""


def random_layer(design: Design, **kwargs: Any) -> MemoryLayer:
    """A layer none of whose numbers is neutral."""
    layer = MemoryLayer(HIDDEN, HEADS, design, **kwargs).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn(p.shape, dtype=torch.float64))
    return layer


def compare(layer: MemoryLayer, ours: Tensor, theirs: Tensor, p: dict[str, Tensor], states: tuple[Tensor, Tensor]) -> None:
    """Outputs [1, T, hidden_size] and [T, hidden_size], and the gradients of a functional of them in everything."""
    assert_close(ours[0], theirs, "out")
    probe(ours).backward()
    probe(theirs).backward()
    assert_close(states[0].grad[0], states[1].grad, "d hidden states")
    assert float(states[1].grad.abs().min()) > 0
    for name, parameter in layer.named_parameters():
        if p[name].grad is None:  # S_0 = 0 is a constant in the papers
            assert name == "memory.W", name
            continue
        assert_close(parameter.grad, p[name].grad, f"d {name}")
        assert float(p[name].grad.abs().max()) > 0, f"{name} is dead"


@pytest.mark.parametrize("name", CASES)
def test_layer_equals_its_paper(name: str) -> None:
    design, paper, options = CASES[name]
    layer = random_layer(design)
    if design.memory.linear:
        torch.nn.init.zeros_(layer.memory.W)
    p = {key: x.detach().clone().requires_grad_() for key, x in layer.named_parameters()}
    x = torch.randn(1, TOKENS, HIDDEN, dtype=torch.float64, requires_grad=True)
    y = x.detach()[0].clone().requires_grad_()
    compare(layer, layer(x)[0], paper(y, p, HEADS, **options), p, (x, y))


def test_later_rwkv7_layers_mix_with_the_first_ones_values() -> None:
    layers = [random_layer(models.rwkv7(), first=first) for first in (True, False)]
    states = [torch.randn(1, TOKENS, HIDDEN, dtype=torch.float64, requires_grad=True) for _ in layers]
    copies = [x.detach()[0].clone().requires_grad_() for x in states]
    shared: dict[str, Tensor] = {}
    for layer in layers:
        torch.nn.init.zeros_(layer.memory.W)
    ours = [layer(x, shared=shared)[0] for layer, x in zip(layers, states, strict=True)]
    p = [{key: x.detach().clone().requires_grad_() for key, x in layer.named_parameters()} for layer in layers]
    first, values = matrix.rwkv7(copies[0], p[0], HEADS)
    later, _ = matrix.rwkv7(copies[1], p[1], HEADS, v_first=values)
    assert_close(ours[0][0], first, "first")
    compare(layers[1], ours[1], later, p[1], (states[1], copies[1]))
    assert_close(states[0].grad[0], copies[0].grad, "d the first layer's hidden states")


def test_every_model_of_one_layer_is_compared() -> None:
    """Here, or in tests/test_models.py, which has the paper's own models, Titans, and softmax attention."""
    elsewhere = {"moneta", "yaad", "memora", "titans_lmm", "transformer", "swa"}
    single = {name for name, f in models.NAMED.items() if isinstance(f(), Design)}
    assert {name.partition(",")[0] for name in CASES} | elsewhere == single
