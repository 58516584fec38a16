"""Gate maps, features, and the options of `Inputs`, each of which must reach the layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from miras import bias, learning, memory, retention
from miras.design import Design
from miras.features import Discretized
from miras.inputs import (
    Constant,
    Features,
    GateMap,
    Inputs,
    LogDecay,
    MambaDecay,
    Normalized,
    Output,
    Plain,
    Positive,
    Rotary,
    Sigmoid,
    Softplus,
    Stream,
)
from miras.layer import MemoryLayer
from tests.problems import assert_close
from tests.test_choice import GATES

SHAPE = (2, 3)


def parameters(gate: GateMap) -> dict[str, Tensor]:
    return {name: x.double() for name, x in gate.parameters(SHAPE).items()}


@pytest.mark.parametrize(
    ("gate", "initial"),
    [
        (Sigmoid(0.3), 0.3),
        (Sigmoid(0.3, 2.0), 0.3),
        (Softplus(3.5), 3.5),
        (Softplus(0.01), 0.01),
        (LogDecay(50.0), -1 / 50),
        (LogDecay(50.0, 4.0), -1 / 50),
        (LogDecay(0.5), -2.0),
    ],
)
def test_initial_values(gate: GateMap, initial: float) -> None:
    found = gate(torch.zeros(4, *SHAPE, dtype=torch.float64), parameters(gate))
    assert found.shape == (4, *SHAPE)
    assert found.flatten().tolist() == pytest.approx([initial] * 24, rel=1e-5)


@pytest.mark.parametrize(
    ("gate", "low", "high"),
    [
        (Sigmoid(0.3, 2.0), 0.0, 2.0),
        (Softplus(1.0), 0.0, math.inf),
        (LogDecay(50.0, 4.0), -math.inf, 0.0),
        (MambaDecay(), -math.inf, 0.0),
    ],
)
def test_ranges_and_gradients(gate: GateMap, low: float, high: float) -> None:
    x = torch.linspace(-100, 100, 60, dtype=torch.float64).reshape(10, *SHAPE).requires_grad_()
    values = {name: p.requires_grad_() for name, p in parameters(gate).items()}
    found = gate(x, values)
    assert torch.isfinite(found).all()
    assert low <= float(found.detach().min()) <= float(found.detach().max()) <= high
    gradients = torch.autograd.grad(found.sum(), [x, *values.values()])
    assert all(torch.isfinite(g).all() and float(g.abs().max()) > 0 for g in gradients)


@pytest.mark.parametrize("gate", GATES, ids=str)
def test_decays_are_never_positive(gate: GateMap) -> None:
    """The declared fact, at projections and positions far out; what does not declare it is positive somewhere."""
    shape = (3, 3) if gate.per_channel else (3,)
    p = {name: value.double() for name, value in gate.parameters(shape).items()}
    x = torch.linspace(-50, 50, 40, dtype=torch.float64) if gate.projected else torch.arange(40.0, dtype=torch.float64)
    found = gate(x.view(-1, *[1] * len(shape)).expand(40, *shape), p)
    assert bool((found <= 0).all()) == gate.decays


def test_formulas_of_gates() -> None:
    x = torch.randn(5, *SHAPE, dtype=torch.float64)
    b = torch.randn(SHAPE, dtype=torch.float64)
    assert_close(Sigmoid(0.5, 3.0)(x, {"bias": b}), 3 / (1 + (-x - b).exp()))
    assert_close(Softplus()(x, {"bias": b}), (1 + (x + b).exp()).log())
    assert_close(LogDecay(temperature=16.0)(x, {"bias": b}), -(1 + (-x - b).exp()).log() / 16)
    assert_close(MambaDecay()(x, {"A_log": 0.3 * b, "dt_bias": b}), -(0.3 * b).exp() * (1 + (x + b).exp()).log())
    assert_close(Constant(0.25)(x, {}), torch.full_like(x, 0.25))


def test_mamba_initial_values() -> None:
    p = MambaDecay().parameters((2000,))
    assert {name: x.shape for name, x in MambaDecay().parameters((4, 3)).items()} == {"A_log": (4, 1), "dt_bias": (4, 3)}
    rate, dt = p["A_log"].exp(), torch.nn.functional.softplus(p["dt_bias"])
    assert 1.0 <= float(rate.min()) < 1.2
    assert 15.8 < float(rate.max()) <= 16.0
    assert 0.0009 <= float(dt.min()) < 0.0012
    assert 0.09 < float(dt.max()) <= 0.1001
    assert float(dt.log().mean()) == pytest.approx(math.log(0.01), abs=0.15)


def test_constant_has_nothing_to_learn() -> None:
    assert Constant(2.0).parameters(SHAPE) == {}
    assert not Constant().projected
    assert Sigmoid().projected


def heads(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def mapped(features: Features, q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None = None) -> tuple[Tensor, ...]:
    """q, k and v after the features."""
    places = torch.arange(q.shape[1]).unsqueeze(0) if positions is None else positions
    made = features(Stream(q, k, v, None, None, {}, places), {})
    return made.q, made.k, made.v


def test_normalized() -> None:
    q, k, v = heads(2, 5, 3, 8), heads(2, 5, 3, 8), heads(2, 5, 3, 8)
    a, b, c = mapped(Normalized(), q, k, v)
    assert_close(a, q / q.norm(dim=-1, keepdim=True), tolerance=1e-5)
    assert torch.equal(c, v)
    _, _, c = mapped(Normalized(values=True), q, k, v)
    assert_close(c, v / v.norm(dim=-1, keepdim=True), tolerance=1e-5)
    assert_close(b.norm(dim=-1), torch.ones(2, 5, 3, dtype=torch.float64), tolerance=1e-5)
    zero = torch.zeros(1, 1, 1, 4, dtype=torch.float64, requires_grad=True)
    out, _, _ = mapped(Normalized(), zero, zero, zero)
    assert torch.isfinite(torch.autograd.grad(out.sum(), zero)[0]).all()


def test_positive() -> None:
    q, k, v = heads(1, 2, 1, 16), heads(1, 2, 1, 16), heads(1, 2, 1, 16)
    a, b, c = mapped(Positive(), q, k, v)
    expected = torch.where(q > 0, q + 1, q.exp()) / 4
    assert_close(a, expected)
    assert float(b.min()) > 0
    assert torch.equal(c, v)
    assert_close(mapped(Positive("relu"), q, k, v)[0], q.clamp_min(0) / 4)
    assert_close(mapped(Positive("exp"), q, k, v)[1], k.exp() / 4)


def test_normalizer() -> None:
    """One more value, always 1, by whose read-out the others are divided: weights that sum to one."""
    features = Positive(normalizer=True)
    q, k, v = heads(1, 6, 2, 8), heads(1, 6, 2, 8), heads(1, 6, 2, 8)
    assert features.widths(8, 5) == (8, 6)
    a, b, c = mapped(features, q, k, v)
    assert_close(c, torch.cat((v, torch.ones(1, 6, 2, 1, dtype=torch.float64)), -1))
    scores = torch.einsum("bthd,bshd->bhts", a, b).tril()
    out = torch.einsum("bhts,bshd->bthd", scores, c)
    stream = Stream(a, b, c, None, None, {}, torch.arange(6).unsqueeze(0))
    expected = torch.einsum("bhts,bshd->bthd", scores / (scores.sum(-1, keepdim=True) + 1e-6), v)
    assert_close(features.read(out, stream, {}, lambda y: y), expected)


def test_rotary_products_depend_on_distance_only() -> None:
    q, k = heads(1, 1, 1, 8).expand(1, 12, 1, 8), heads(1, 1, 1, 8).expand(1, 12, 1, 8)
    positions = torch.arange(12).unsqueeze(0)
    a, b, c = mapped(Rotary(100.0), q, k, q, positions)
    assert torch.equal(c, q)
    scores = torch.einsum("bthd,bshd->ts", a, b)
    for distance in range(12):
        diagonal = scores.diagonal(-distance)
        assert_close(diagonal, diagonal[:1].expand_as(diagonal), tolerance=1e-5)
    assert float((scores[3, 0] - scores[0, 0]).abs()) > 1e-3
    assert_close(a.norm(dim=-1), q.norm(dim=-1), tolerance=1e-6)
    first, _, _ = mapped(Rotary(), q, k, q, torch.zeros(1, 12))
    assert_close(first, q)
    twice = mapped(Rotary(100.0), q, k.repeat_interleave(2, 1), q, positions)[1]
    assert_close(twice, b.repeat_interleave(2, 1), "two micro-steps at one position")
    angle = 3 * 100.0 ** (-torch.arange(4) / 4)
    turned = torch.complex(q[0, 3, 0, :4], q[0, 3, 0, 4:]) * torch.polar(torch.ones(4), angle)
    assert_close(a[0, 3, 0], torch.cat((turned.real, turned.imag)), tolerance=1e-6)


def test_rotary_needs_pairs() -> None:
    with pytest.raises(ValueError, match="even head width, got 3"):
        mapped(Rotary(), *[heads(1, 1, 1, 3)] * 3)


def test_features_keep_dtype() -> None:
    features: list[Features] = [Plain(), Normalized(), Normalized(values=True), Positive(), Rotary()]
    for feature in features:
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            q = torch.randn(1, 3, 2, 4).to(dtype)
            assert {x.dtype for x in mapped(feature, q, q, q)} == {dtype}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Sigmoid(0.0), "initial=0.0, maximum=1.0; needs 0 < initial < maximum"),
        (lambda: Sigmoid(1.0), "needs 0 < initial < maximum"),
        (lambda: Softplus(0.0), "initial=0.0; must be positive"),
        (lambda: LogDecay(0.0), "horizon=0.0; must be a positive number of tokens"),
        (lambda: LogDecay(1.0, -1.0), "temperature=-1.0; must be positive"),
        (lambda: Inputs(conv_size=-1), "conv_size=-1; must be 0"),
        (lambda: Inputs(activation="gelu"), "activation='gelu'; allowed: 'silu', None"),
        (lambda: Inputs(weight_std=-0.1), "weight_std=-0.1; must not be negative"),
        (lambda: Inputs(Discretized()), "features Discretized make the decay themselves: leave decay=None"),
        (lambda: Inputs(decay=Sigmoid()), "is no log-decay: it can be positive"),
        (lambda: Inputs(decay=Constant(0.1)), "is no log-decay"),
        (lambda: Inputs(key_ratio=0.0), "key_ratio=0.0, value_ratio=1.0; must be positive"),
        (lambda: Inputs(key_heads=0), "key_heads=0; must be at least 1"),
        (lambda: Inputs(conv_size=0, conv_bias=True), "conv_bias=True needs a convolution"),
        (lambda: Positive("tanh"), "map='tanh'; allowed: 'elu', 'relu', 'exp'"),
        (lambda: Output("batch"), "norm='batch'; allowed: 'rms', 'layer', None"),
        (lambda: Output(gate="relu"), "gate='relu'; allowed: 'silu', 'sigmoid'"),
        (lambda: Output(between="relu"), "between='relu'; allowed: 'silu', 'sigmoid'"),
        (lambda: Output(rank=0), "rank=0; must be at least 1"),
        (lambda: Output(gate=None, rank=4), "gate=None with rank=4.*belong to the gate's projection"),
        (lambda: Output(gate=None, gate_bias=True), "gate=None with .*gate_bias=True"),
        (lambda: Output(between="tanh"), "between='tanh' with rank=None: only a low-rank projection has a middle"),
        (lambda: Output(groups=0), "groups=0; must be at least 1"),
    ],
)
def test_illegal_values(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


CHANGES: dict[str, Any] = {
    "features": Rotary(),
    "rate": Softplus(0.0123),
    "decay": None,
    "gates": {"delta": Softplus(0.05)},
    "conv_size": Inputs().conv_size + 1,
    "activation": None,
    "weight_std": 0.123,
    "norm_gain": 0.77,
    "aligned": not Inputs().aligned,
    "output": Output(norm=None),
    "conv_bias": True,
    "key_ratio": 0.5,
    "value_ratio": 0.5,
    "key_heads": 1,
    "token_shift": True,
}


CHOICES: dict[str, Any] = {
    "memory": memory.Matrix(),
    "bias": bias.L2(),
    "retention": retention.L2(),
    "learning": learning.GradientDescent(),
}


def layer_output(inputs: Inputs) -> Tensor:
    torch.manual_seed(0)
    deep = memory.MLP(2, 1.0, residual=False)  # which takes keys and values of any widths
    design = Design(deep, bias.Huber("norm"), retention.L2(), learning.GradientDescent(), 4, inputs=inputs)
    layer = MemoryLayer(8, 2, design).double()
    aligned = torch.equal(layer.q_proj.weight, layer.k_proj.weight)
    with torch.no_grad():
        for name, p in layer.named_parameters():  # equal draws whatever the order of initialisation
            if (p.dim() > 1 and not name.startswith("memory")) or name.endswith("conv1d.bias"):
                g = torch.Generator().manual_seed(sum(map(ord, name)))
                p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype) / 3)
        if aligned:
            layer.q_proj.weight.copy_(layer.k_proj.weight)
    x = torch.randn(1, 11, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return layer(x)[0].detach()


def test_changes_cover_every_field() -> None:
    assert set(CHANGES) == {field.name for field in dataclasses.fields(Inputs)}


@pytest.mark.parametrize("name", CHANGES)
def test_every_option_reaches_the_layer(name: str) -> None:
    assert float((layer_output(Inputs()) - layer_output(Inputs(**{name: CHANGES[name]}))).abs().max()) > 1e-6


OUTPUTS: dict[str, Any] = {
    "norm": None,
    "groups": 1,
    "shared": False,
    "gate": "sigmoid",
    "gate_first": True,
    "rank": 2,
    "eps": 0.1,
}


def test_outputs_cover_every_field() -> None:
    assert {*OUTPUTS, "between", "gate_bias"} == {field.name for field in dataclasses.fields(Output)}


@pytest.mark.parametrize("name", OUTPUTS)
def test_every_option_of_the_output_reaches_the_layer(name: str) -> None:
    """`shared` and `gate_bias` start without effect: they add numbers to learn."""
    changed = Output(**{name: OUTPUTS[name]})
    if name == "shared":
        layers = [MemoryLayer(8, 2, Design(**CHOICES, inputs=Inputs(output=output))) for output in (Output(), changed)]
        assert [len(layer.o_norm.weight) for layer in layers] == [4, 8]
        return
    assert float((layer_output(Inputs()) - layer_output(Inputs(output=changed))).abs().max()) > 1e-6


def test_low_rank_gates_of_the_output() -> None:
    plain = layer_output(Inputs(output=Output(rank=2)))
    assert float((plain - layer_output(Inputs(output=Output(rank=2, between="tanh")))).abs().max()) > 1e-6
    layer = MemoryLayer(8, 2, Design(**CHOICES, inputs=Inputs(output=Output(rank=2, gate_bias=True))))
    assert layer.g_proj[0].weight.shape == (2, 8)
    assert layer.g_proj[1].bias.shape == (8,)


@pytest.mark.parametrize("change", [{"per_channel": True}, {"rank": 2}])
@pytest.mark.parametrize("name", ["rate", "decay"])
def test_options_of_gate_maps_reach_the_layer(name: str, change: dict[str, Any]) -> None:
    plain = Inputs()
    changed = dataclasses.replace(plain, **{name: dataclasses.replace(getattr(plain, name), **change)})
    assert float((layer_output(plain) - layer_output(changed)).abs().max()) > 1e-9


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("features", {"features": Plain}),
        ("rate", {"rate": None}),
        ("decay", {"decay": {"kind": "LogDecay"}}),
        ("gates", {"gates": {"delta": 1.0}}),
        ("output", {"output": None}),
    ],
)
def test_wrong_types(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=rf"{name}.*; must be a (Features|GateMap|Output) \(an instance"):
        Inputs(**changes)
