"""Memories: shapes, their forward pass against numpy, gradients as rank-one factors, and the fact `linear`."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from miras import memory
from miras.memory import ACTIVATIONS, MLP, GatedMLP, Matrix, Memory, Vector
from tests import recurrences as r
from tests.problems import assert_close

WIDTH = 4

CASES: dict[str, tuple[Memory, object]] = {
    "vector": (Vector(), r.vector),
    "matrix": (Matrix(), r.matrix),
    "gated": (GatedMLP(1.5), r.gated_mlp),
    **{
        f"{depth} {act} {residual} {norm}": (MLP(depth, 1.5, act, residual, norm), r.mlp(depth, act, residual, norm))
        for depth, act, (residual, norm) in itertools.product(
            (1, 2, 3, 4), ACTIVATIONS, ((True, "layer"), (False, "rms"), (True, None), (False, "layer"))
        )
        if depth > 1 or act == "gelu"
    },
    **{f"fast bias {depth}": (MLP(depth, 1.5, fast_bias=True), r.mlp(depth)) for depth in (1, 2, 3)},
}


def weights_of(m: Memory, key: int = WIDTH, value: int = WIDTH) -> dict[str, Tensor]:
    shapes = m.weights(key, value)
    return {name: torch.randn(s.d_in, s.d_out, dtype=torch.float64) for name, s in shapes.items()}


def slow_of(m: Memory) -> dict[str, Tensor]:
    return {name: x + 0.3 * torch.randn(1, WIDTH, dtype=torch.float64) for name, x in m.slow(WIDTH).items()}


def predict(m: Memory, weights: dict[str, Tensor], x: Tensor, slow: dict[str, Tensor] | None = None) -> Tensor:
    return m(x, lambda name, h: h @ weights[name], slow or {})


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("with_slow", [False, True])
def test_forward_and_gradients_equal_numpy(name: str, with_slow: bool) -> None:
    m, expected = CASES[name]
    weights, x, dy = weights_of(m), torch.randn(1, WIDTH, dtype=torch.float64), torch.randn(1, WIDTH, dtype=torch.float64)
    slow = slow_of(m) if with_slow else {}
    tracked = {n: w.clone().requires_grad_() for n, w in weights.items()}
    y = predict(m, tracked, x, slow)
    (y * dy).sum().backward()
    arrays = {n: w.numpy() for n, w in weights.items()} | {n: w[0].numpy() for n, w in slow.items()}
    assert_close(y.detach()[0], torch.from_numpy(expected(arrays, x[0].numpy())), "y")  # type: ignore[operator]
    for n, gradient in expected(arrays, x[0].numpy(), dy[0].numpy()).items():  # type: ignore[operator]
        assert_close(tracked[n].grad, torch.from_numpy(gradient), n)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_inputs_times_errors_at_the_linears(name: str) -> None:
    """What the engine builds on: every product with a fast weight goes through `linear`, once."""
    m, _ = CASES[name]
    weights = {n: w.requires_grad_() for n, w in weights_of(m).items()}
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def record(n: str, x: Tensor) -> Tensor:
        assert n not in seen, f"{n} is used twice"
        seen[n] = x, x @ weights[n]
        return seen[n][1]

    y = m(torch.randn(3, WIDTH, dtype=torch.float64), record, slow_of(m))
    assert set(seen) == set(weights)
    loss = y.sin().sum()
    errors = torch.autograd.grad(loss, [z for _, z in seen.values()], retain_graph=True)
    gradients = torch.autograd.grad(loss, [weights[n] for n in seen])
    for (x, _), error, gradient in zip(seen.values(), errors, gradients, strict=True):
        assert_close(x.mT @ error, gradient)


@pytest.mark.parametrize("name", CASES)
def test_linear_is_true(name: str) -> None:
    m, _ = CASES[name]
    a, b, x = weights_of(m), weights_of(m), torch.randn(5, WIDTH, dtype=torch.float64)
    mixed = predict(m, {n: 2 * a[n] - 3 * b[n] for n in a}, x)
    gap = mixed - 2 * predict(m, a, x) + 3 * predict(m, b, x)
    if m.linear:
        assert_close(gap, torch.zeros_like(gap))
        assert len(a) == 1
        (weight,) = a.values()
        assert_close(predict(m, a, x), x @ weight)
    else:
        assert isinstance(m, Vector) or float(gap.abs().max()) > 1e-6


def test_shapes() -> None:
    assert Matrix().weights(3, 5) == {"W": (3, 5, 0)}
    assert Vector().weights(3, 3) == {"w": (1, 3, 1)}
    assert MLP(1).weights(3, 3) == {"up": (3, 3, 0)}
    assert MLP(2, 4.0).weights(3, 3) == {"up": (3, 12, 0), "down": (12, 3, 1)}
    assert MLP(4, 2.0, residual=False).weights(3, 5) == {
        "up": (3, 10, 0),
        "hidden1": (10, 10, None),
        "hidden2": (10, 10, None),
        "down": (10, 5, 1),
    }
    assert MLP(1, fast_bias=True).weights(3, 3) == {"up": (3, 3, 0), "up_bias": (1, 3, 1)}
    fast = MLP(2, 2.0, fast_bias=True)
    assert fast.weights(3, 3) == {"up": (3, 6, 0), "down": (6, 3, 1), "up_bias": (1, 6, None), "down_bias": (1, 3, 1)}
    assert fast.offsets == ("up_bias", "down_bias")
    assert GatedMLP(2.0).weights(3, 5) == {"gate": (3, 10, 0), "up": (3, 10, 0), "down": (10, 5, 1)}
    assert MLP(2, 0.01).weights(3, 3)["up"].d_out == 1


@pytest.mark.parametrize("name", CASES)
def test_neutral_slow_parameters_change_nothing(name: str) -> None:
    m, _ = CASES[name]
    weights, x = weights_of(m), torch.randn(2, WIDTH, dtype=torch.float64)
    neutral = {n: torch.full((1, WIDTH), value, dtype=torch.float64) for n, value in m.slow(WIDTH).items()}
    assert_close(predict(m, weights, x, neutral), predict(m, weights, x))
    assert set(neutral) == ({"norm.weight", "norm.bias"} if isinstance(m, MLP) and m.norm else set())


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_norm_eps_at_its_edge(norm: str) -> None:
    x = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    y = memory.normalize(x, norm)
    y.sum().backward()
    assert torch.equal(y, torch.zeros_like(y))
    assert torch.isfinite(x.grad).all()
    expected = torch.nn.functional.layer_norm if norm == "layer" else torch.nn.functional.rms_norm
    z = torch.randn(4, 6, dtype=torch.float64)
    assert_close(memory.normalize(z, norm), expected(z, (6,), eps=1e-5))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MLP(depth=0), "depth=0.*at least 1"),
        (lambda: MLP(expansion=0.0), "expansion=0.0; must be positive"),
        (lambda: MLP(activation="swish"), "activation='swish'; allowed: 'gelu', 'gelu_tanh', 'silu'"),
        (lambda: MLP(norm="batch"), "norm='batch'; allowed: 'layer', 'rms', None"),
        (lambda: GatedMLP(-1.0), "expansion=-1.0; must be positive"),
        (lambda: Vector().weights(3, 4), "key width 3 must equal value width 4"),
        (lambda: MLP().weights(3, 4), "key width 3 must equal value width 4.*residual=False"),
    ],
)
def test_illegal_values(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()  # type: ignore[operator]
