"""Feature and gate maps of single papers: their formulas, where they start, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from miras.features import (
    BoundedDecay,
    DiagonalImplicit,
    Discretized,
    FixedDecay,
    ForgetKeys,
    InContext,
    MiniBatch,
    Polynomial,
    TimeStep,
    WindowRate,
)
from miras.inputs import Features, Normalized, Plain, Positive, Rotary, Stream
from tests.problems import assert_close
from tests.test_choice import public_classes

B, T, H, K = 2, 5, 3, 4


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def stream(**changes: Any) -> Stream:
    fields = {"q": normal(B, T, H, K), "k": normal(B, T, H, K), "v": normal(B, T, H, K), "log_decay": None, "gates": {}}
    rates = {"lr": torch.rand(B, T, H, dtype=torch.float64), "positions": torch.arange(T).unsqueeze(0)}
    return Stream(**{**fields, **rates, **changes})


def numbers(features: Features) -> dict[str, Tensor]:
    return {name: x.double() + 0.1 * normal(*x.shape) for name, x in features.parameters(H, K, K).items()}


def test_fixed_decays() -> None:
    x = torch.zeros(2, 7, 4, dtype=torch.float64)
    retnet = FixedDecay()(x, {}).exp()
    assert_close(retnet, torch.tensor([1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128, 1 - 1 / 256]).double().expand_as(x))
    slopes = FixedDecay("slopes", 0.5)(x, {})
    assert_close(slopes, -0.5 * torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256]).double().expand_as(x))


def test_bounded_decay() -> None:
    """log w = -exp(-1/2) sigmoid(x + b): never below exp(-exp(-1/2)); its biases rise over the channels."""
    bias = BoundedDecay().parameters((H, K))["bias"].double()
    x = 50 * normal(T, H, K)
    assert_close(BoundedDecay()(x, {"bias": bias}), -math.exp(-0.5) / (1 + (-x - bias).exp()))
    assert bias.shape == (H, K)
    assert bool((bias.flatten().diff() > 0).all())
    assert BoundedDecay().parameters((1, 1))["bias"].tolist() == [[-5.5]]


def test_time_steps() -> None:
    p = TimeStep().parameters((500,))
    x = normal(3, 500)
    assert_close(TimeStep()(x, {"dt_bias": p["dt_bias"].double()}), (1 + (x + p["dt_bias"].double()).exp()).log())
    dt = torch.nn.functional.softplus(p["dt_bias"])
    assert 0.0009 < float(dt.min()) < 0.0015
    assert 0.07 < float(dt.max()) < 0.1001


def test_window_rate_counts_places_in_the_window() -> None:
    shift = torch.tensor([0.5, -2.0, 0.0], dtype=torch.float64, requires_grad=True)
    positions = torch.arange(7, dtype=torch.float64).view(1, 7, 1).expand(1, 7, 2)
    found = WindowRate(3)(positions, {"shift": shift})
    assert found[0, :, 1].tolist() == pytest.approx([1.5, 0, 1 / 3, 1.5, 0, 1 / 3, 1.5])
    assert WindowRate(3).parameters((2,))["shift"].shape == (3,)
    assert torch.autograd.grad(found.sum(), shift)[0].tolist() == [6, 0, 4]


def test_mini_batch_turns_by_the_place_in_the_window() -> None:
    s = stream()
    made = MiniBatch(length=3)(s, {})
    for t in range(T):
        alone = stream(
            **{name: getattr(s, name)[:, t : t + 1] for name in ("q", "k", "v", "lr")}, positions=torch.tensor([[t % 3]])
        )
        expected = Rotary()(alone, {})
        assert_close(made.q[:, t : t + 1], expected.q)
        assert_close(made.k[:, t : t + 1], expected.k)
    assert_close(made.lr, s.lr / K)


@pytest.mark.parametrize("bound", [0.0, 0.4])
def test_forget_keys(bound: float) -> None:
    s = stream()
    made = ForgetKeys(bound)(s, {})
    f = bound + (1 - bound) / (1 + (-s.k).exp())
    assert_close(made.log_decay.exp(), f)
    assert_close(made.k, 1 - f)
    assert_close(made.q, s.q / (1 + (-s.q).exp()))


@pytest.mark.parametrize("bound", [0.0, 0.4])
def test_forget_keys_far_out(bound: float) -> None:
    """Exact where f rounds to 1 and where it rounds to 0."""
    k = torch.tensor([-200.0, -20.0, 20.0, 200.0]).expand(1, 1, 1, 4).requires_grad_()
    made = ForgetKeys(bound)(stream(k=k), {})
    assert torch.isfinite(made.log_decay).all()
    assert made.log_decay[..., 2].item() == pytest.approx(-(1 - bound) * math.exp(-20), rel=1e-5)
    (gradient,) = torch.autograd.grad(made.log_decay.sum() + made.k.sum(), k)
    assert torch.isfinite(gradient).all()


def test_diagonal_implicit() -> None:
    s = stream(lr=5 * torch.rand(B, T, H, dtype=torch.float64), k=3 * normal(B, T, H, K))
    made = DiagonalImplicit()(s, {})
    e = s.lr / (1 + s.lr * (s.k * s.k).sum(-1))
    assert_close(made.lr, e)
    assert_close(made.log_decay.exp(), 1 - e[..., None] * s.k**2)
    assert float(made.log_decay.exp().min()) > 0


def test_discretized() -> None:
    s, features = stream(), Discretized()
    p = numbers(features)
    made = features(s, p)
    assert_close(made.log_decay, -p["A_log"].exp() * s.lr)
    out = normal(B, T, H, K)
    assert_close(features.read(out, made, p, lambda y: 2 * y), 2 * (out + p["D"][:, None] * s.v))
    assert features.parameters(H, K, K)["D"].tolist() == [1.0] * H


def test_in_context() -> None:
    features = InContext()
    p, rate = numbers(features), torch.rand(B, T, H, K, dtype=torch.float64)
    s = stream(lr=rate)
    made = features(s, p)
    removal = s.k * p["k_k"]
    assert_close(made.k[:, ::2], removal / removal.norm(dim=-1, keepdim=True), tolerance=1e-5)
    assert_close(made.k[:, 1::2], s.k * (1 + (rate - 1) * p["k_a"]))
    assert_close(made.v[:, ::2], torch.zeros_like(s.v))
    assert_close(made.v[:, 1::2], s.v)
    assert_close(made.lr[:, ::2], rate)
    assert_close(made.lr[:, 1::2], torch.ones_like(rate))
    assert made.gates["ridge"][0, :, 0].tolist() == [1, 0] * T
    assert set(made.gates) == {"ridge"}
    out = normal(B, T, H, K)
    bonus = (s.q * made.k[:, 1::2] * p["r_k"]).sum(-1, keepdim=True) * s.v
    assert_close(features.read(out, made, p, lambda y: 2 * y), 2 * out + bonus)


def test_in_context_mixes_with_the_first_layers_values() -> None:
    features = InContext()
    p, shared, rate = numbers(features), {}, torch.rand(B, T, H, K, dtype=torch.float64)
    first = stream(lr=rate, shared=shared)
    features(first, p)
    assert features.gates(True) == ()
    (gate,) = features.gates(False)
    share = torch.rand(B, T, H, K, dtype=torch.float64)
    later = stream(lr=rate, shared=shared, gates={gate.name: share})
    made = features(later, p)
    assert_close(made.v[:, 1::2], (1 - share) * later.v + share * first.v)


def test_polynomial() -> None:
    """Products of keys are x.y + c^2 ((x.y)^2 + sum x_i^2 y_i^2) / 2."""
    features = Polynomial()
    assert features.widths(K, 3) == (K + K * (K + 1) // 2, 3)
    s, coefficient = stream(), torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    made = features(s, {"coefficient": coefficient})
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (s.q, s.k))
    dot = (q * k).sum(-1)
    squares = (q**2 * k**2).sum(-1)
    assert_close((made.q * made.k).sum(-1), dot + coefficient**2 * (dot**2 + squares) / 2, tolerance=1e-5)
    assert made.k.shape[-1] == features.widths(K, 3)[0]


EVERY: list[Features] = [
    Plain(),
    Normalized(values=True),
    Positive(),
    Positive(normalizer=True),
    Rotary(),
    MiniBatch(length=4),
    ForgetKeys(0.1),
    DiagonalImplicit(),
    Discretized(),
    InContext(),
    Polynomial(),
]


@pytest.mark.parametrize("features", EVERY, ids=str)
def test_declared_facts_are_true(features: Features) -> None:
    p, shared = numbers(features), {}
    channels = features.makes_steps > 0
    s = stream(shared=shared, lr=torch.rand(B, T, H, *([K] if channels else []), dtype=torch.float64))
    made = features(s, p)
    assert (made.k.shape[-1], made.v.shape[-1]) == features.widths(K, K)
    assert made.k.shape[1] == T * max(1, features.makes_steps)
    assert (made.log_decay is not None) == features.makes_decay
    wide = any(x is not None and x.dim() == 4 for x in (made.lr, made.log_decay))
    assert wide == features.per_channel
    assert set(made.gates) == set(features.supplies)
    assert bool(shared) == features.shares == bool(features.gates(False))
    assert features.gates(True) == ()
    out = normal(B, T, H, features.widths(K, K)[1])
    normed = torch.equal(features.read(out, made, p, lambda y: 3 * y), 3 * out)
    assert normed != features.own_read


def test_every_feature_map_is_checked() -> None:
    public = {x for x in public_classes() if issubclass(x, Features)}
    assert public == {type(x) for x in EVERY}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FixedDecay("alibi"), "schedule='alibi'; allowed: 'retnet', 'slopes'"),
        (lambda: FixedDecay(scale=0.0), "scale=0.0; must be positive"),
        (lambda: FixedDecay(per_channel=True), "one number a head"),
        (lambda: WindowRate(0), "length=0; must be the design's refresh"),
        (lambda: MiniBatch(length=0), "length=0; must be the design's refresh"),
        (lambda: ForgetKeys(1.0), r"lower_bound=1.0; must be in \[0, 1\)"),
    ],
)
def test_illegal_values(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
