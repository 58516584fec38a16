"""Biases: gradients against their losses, what they declare, proximal maps against numerical minimisation."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from miras.bias import L2, NORM_EPS, Bias, Dot, Envelope, Huber, Lp, RidgeDot, Robust
from tests.problems import assert_close
from tests.table import LogCosh

BIASES: dict[str, Bias] = {
    "Dot": Dot(),
    "L2": L2(),
    "Lp 1": Lp(1.0),
    "Lp 1.5": Lp(1.5),
    "Lp 2": Lp(2.0),
    "Lp 3": Lp(3.0),
    "Lp 4": Lp(4.0),
    "Huber coordinate": Huber("coordinate"),
    "Huber norm": Huber("norm"),
    "Huber switch": Huber("switch"),
    "Robust": Robust(),
    "RidgeDot": RidgeDot(),
    "Envelope RidgeDot": Envelope(RidgeDot()),
    "Envelope Dot": Envelope(Dot()),
    "Envelope L2": Envelope(L2()),
    "Envelope coordinate": Envelope(Huber("coordinate")),
    "Envelope norm": Envelope(Huber("norm")),
    "Envelope Robust": Envelope(Robust()),
    "log cosh": LogCosh(),
}

PROXIMAL = [name for name, b in BIASES.items() if b.has_proximal]


def example(size: int = 40, width: int = 3) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    y, v = (torch.randn(size, width, dtype=torch.float64) for _ in range(2))
    gates = {name: 0.2 + 1.5 * torch.rand(size, 1, dtype=torch.float64) for name in ("delta", "Delta", "ridge", "smoothing")}
    return y, v, gates


def by_autograd(b: Bias, y: Tensor, v: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
    point = y.clone().requires_grad_()
    return torch.autograd.grad(b.loss(point, v, gates).sum(), point)[0]


@pytest.mark.parametrize("name", BIASES)
def test_gradient_is_the_loss_differentiated(name: str) -> None:
    y, v, gates = example()
    b = BIASES[name]
    assert b.loss(y, v, gates).shape == (40,)
    assert_close(b.gradient(y, v, gates).detach(), by_autograd(b, y, v, gates), name)


@pytest.mark.parametrize("name", BIASES)
def test_gradient_by_finite_differences(name: str) -> None:
    y, v, gates = example(size=6)
    b = BIASES[name]
    assert torch.autograd.gradcheck(lambda p: b.loss(p, v, gates), y.requires_grad_())
    tracked = [y, v.requires_grad_(), *(x.requires_grad_() for x in gates.values())]

    def gradient(y: Tensor, v: Tensor, *values: Tensor) -> Tensor:
        return b.gradient(y, v, dict(zip(gates, values, strict=True)))

    assert torch.autograd.gradcheck(gradient, tracked)


@pytest.mark.parametrize("name", BIASES)
def test_gradient_keeps_no_graph_where_none_is_wanted(name: str) -> None:
    y, v, gates = example(size=3)
    with torch.no_grad():
        assert not BIASES[name].gradient(y, v, gates).requires_grad


@pytest.mark.parametrize("name", BIASES)
def test_slope_is_true(name: str) -> None:
    """constant: the same at every y; affine: c_t (y - y0_t), one c_t >= 0 a token whatever v; general: neither."""
    b, (y, v, gates) = BIASES[name], example()
    other, origin = 3 * torch.randn_like(y), torch.zeros_like(y)
    at = {key: b.gradient(p, v, gates).detach() for key, p in (("y", y), ("other", other), ("origin", origin))}
    constant = torch.allclose(at["y"], at["other"], atol=1e-12)
    slopes = (at["y"] - at["origin"]) / y
    affine = torch.allclose(slopes, slopes[:, :1].expand_as(slopes), atol=1e-9) and torch.allclose(
        at["other"] - at["origin"], slopes[:, :1] * other, atol=1e-9
    )
    assert b.slope in ("constant", "affine", "general")
    if b.slope == "constant":
        assert constant
    elif b.slope == "affine":
        assert affine
        assert not constant
        assert float(slopes.min()) >= 0
        none = torch.zeros_like(v[..., :1])
        alone = b.gradient(none + 1, none, gates) - b.gradient(none, none, gates)
        torch.testing.assert_close(alone.expand_as(slopes), slopes, atol=1e-9, rtol=1e-9)
    elif name != "Lp 2":  # which is L2, under a name that covers every p
        assert not affine
        assert not constant


class Recorder(dict[str, Tensor]):
    """A mapping that remembers what was read."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__(values)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return super().__getitem__(name)


@pytest.mark.parametrize("name", BIASES)
@pytest.mark.parametrize("method", ["loss", "gradient"])
def test_gates_and_implicit_are_what_is_read(name: str, method: str) -> None:
    b, (y, v, gates) = BIASES[name], example()
    recorder = Recorder(gates)
    getattr(b, method)(y, v, recorder)
    if b.implicit and method == "gradient" and isinstance(b, Envelope) and isinstance(b.bias, Dot):
        recorder["smoothing"]
    declared = {gate.name for gate in b.gates} | ({"smoothing"} if b.implicit else set())
    assert recorder.read == declared


@pytest.mark.parametrize("name", BIASES)
def test_every_gate_changes_the_gradient(name: str) -> None:
    b, (y, v, gates) = BIASES[name], example()
    for gate in b.gates:
        assert gate.minimum <= gate.initial <= gate.maximum
        changed = {**gates, gate.name: gates[gate.name] + 0.5}
        assert float((b.gradient(y, v, changed) - b.gradient(y, v, gates)).abs().max()) > 1e-3


@pytest.mark.parametrize("name", PROXIMAL)
def test_proximal_minimises(name: str) -> None:
    """Nothing near or far does better, and a numerical minimiser ends there."""
    b, (y, v, gates) = BIASES[name], example()
    y = torch.cat((y, v[:10] + 0.1 * y[:10]))  # some inside Robust's reach
    v = torch.cat((v, v[:10]))
    gates = {key: torch.cat((x, x[:10])) for key, x in gates.items()}
    step = 0.1 + 3 * torch.rand(len(y), 1, dtype=torch.float64)

    def objective(p: Tensor) -> Tensor:
        return b.loss(p, v, gates) + (p - y).square().sum(-1) / (2 * step.squeeze(-1))

    p = b.proximal(y, v, gates, step)
    best = objective(p)
    for scale in (1e-3, 1e-2, 0.1, 1.0, 10.0):
        for _ in range(20):
            assert float((best - objective(p + scale * torch.randn_like(p))).max()) <= 1e-12
    q = y.clone().requires_grad_()
    search = torch.optim.LBFGS(
        [q], max_iter=400, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        search.zero_grad()
        total = objective(q).sum()
        total.backward()
        return total

    search.step(closure)
    # Robust's norm is smoothed, sqrt(||e||^2 + eps): in its kink the smoothed minimum is lower by up to Delta sqrt(eps).
    slack = float(gates["Delta"].max()) * NORM_EPS**0.5 if "Robust" in name else 0.0
    assert float((best - objective(q.detach())).max()) <= 1e-9 + slack
    if not isinstance(b, Robust):  # whose kink stops the search short
        assert_close(p, q, name, tolerance=1e-5)
    smooth = (p - v).norm(dim=-1) > 0.1
    optimality = (by_autograd(b, p, v, gates) + (p - y) / step)[smooth]
    assert_close(optimality, torch.zeros_like(optimality), "optimality", tolerance=1e-8)


@pytest.mark.parametrize("name", PROXIMAL)
def test_implicit_gradient_without_smoothing_is_the_gradient(name: str) -> None:
    b, (y, v, gates) = BIASES[name], example()
    none = torch.zeros_like(gates["delta"])
    assert_close(b.implicit_gradient(y, v, gates, none), b.gradient(y, v, gates))
    assert torch.equal(b.proximal(y, v, gates, none), y)
    tiny = torch.full_like(none, 1e-7)
    assert_close(b.implicit_gradient(y, v, gates, tiny), b.gradient(y, v, gates), tolerance=1e-5)
    envelope = Envelope(b)
    assert_close(by_autograd(envelope, y, v, {**gates, "smoothing": none}), b.gradient(y, v, gates), "edge of 1 / step")


def test_envelope_step_is_the_implicit_step() -> None:
    """After a step of rate eta on the envelope, the prediction is the proximal point of the old one."""
    for name in PROXIMAL:
        y, v, gates = example(size=1)
        k, eta = torch.randn(1, 5, dtype=torch.float64), 0.7
        step = (eta * k.square().sum(-1, keepdim=True)).double()
        weight = torch.linalg.pinv(k) @ y
        g = Envelope(BIASES[name]).gradient(k @ weight, v, {**gates, "smoothing": step})
        after = k @ (weight - eta * k.mT @ g)
        assert_close(after, BIASES[name].proximal(y, v, gates, step), name)


def test_longhorn() -> None:
    y, v, gates = example()
    assert_close(Envelope(L2()).gradient(y, v, gates), (y - v) / (1 + gates["smoothing"]))


def test_special_cases_agree() -> None:
    y, v, gates = example()
    e = y - v
    wide = {key: x + 1e3 for key, x in gates.items()}
    none = {key: torch.zeros_like(x) for key, x in gates.items()}
    for form in ("coordinate", "norm", "switch"):
        assert_close(Huber(form).gradient(y, v, wide), e, form)
        assert_close(Huber(form).gradient(y, v, none), torch.zeros_like(e), form)
    assert_close(Robust().gradient(y, v, none), e)
    assert_close(Lp(2.0).gradient(y, v, gates), e)
    assert_close(RidgeDot().gradient(y, v, none), Dot().gradient(y, v, {}))
    assert_close(RidgeDot().gradient(y, v, {"ridge": torch.ones(40, 1, dtype=torch.float64)}), e)
    assert_close(Lp(2.0).loss(y, v, gates) - L2().loss(y, v, gates), torch.full((40,), 1.5e-6, dtype=torch.float64))
    assert_close(Envelope(Dot()).gradient(y, v, gates), -v)


def test_formulas_on_numbers() -> None:
    """Worked out on paper for e = (3, -4), ||e|| = 5, delta = Delta = 2, smoothing 1."""
    y, v = torch.tensor([[4.0, -2.0]], dtype=torch.float64), torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    numbers = {"delta": 2.0, "Delta": 2.0, "ridge": 0.5, "smoothing": 1.0}
    gates = {name: torch.tensor([[x]], dtype=torch.float64) for name, x in numbers.items()}
    expected = {
        Dot(): (0.0, [-1, -2]),
        L2(): (12.5, [3, -4]),
        RidgeDot(): (0.25 * 20, [1, -3]),
        Lp(3.0): ((27 + 64) / 3, [9, -16]),
        Lp(4.0): ((81 + 256) / 4, [27, -64]),
        Huber("coordinate"): (2 * 2 + 2 * 3, [2, -2]),
        Huber("norm"): (2 * 4, [1.2, -1.6]),
        Huber("switch"): (14, [2, -2]),
        Robust(): (12.5 + 10, [4.2, -5.6]),
        Envelope(L2()): (6.25, [1.5, -2]),
        Envelope(Huber("norm")): (4 + 2, [1.2, -1.6]),
        Envelope(Huber("coordinate")): (6.25, [1.5, -2]),
        Envelope(Robust()): (4.125 + 6.125, [2.1, -2.8]),
    }
    for b, (loss, gradient) in expected.items():
        assert float(b.loss(y, v, gates)) == pytest.approx(loss, abs=1e-4), b
        assert b.gradient(y, v, gates)[0].tolist() == pytest.approx(gradient, abs=1e-4), b


@pytest.mark.parametrize("name", BIASES)
def test_finite_where_the_prediction_is_right(name: str) -> None:
    """At e = 0 every eps is at its edge."""
    y, _, gates = example(size=4)
    y = y.requires_grad_()
    g = BIASES[name].gradient(y, y.detach().clone(), gates)
    (dy,) = torch.autograd.grad(g.sum(), y) if g.requires_grad else (torch.zeros_like(y),)
    assert torch.isfinite(g).all()
    assert torch.isfinite(dy).all()
    if "Dot" not in name:
        assert float(g.detach().abs().max()) == 0.0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Lp(0.5), "p=0.5; must be at least 1"),
        (lambda: Huber("both"), "form='both'; allowed: 'coordinate', 'norm', 'switch'"),
        (lambda: Envelope(Lp(3.0)), "Envelope needs a bias with a proximal map; 'Lp' gives none"),
        (lambda: Envelope(Huber("switch")), "'Huber' gives none"),
        (lambda: Envelope(L2), "Envelope needs a bias"),
    ],
)
def test_illegal_values(build: Callable[[], Bias], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_no_proximal_map() -> None:
    y, v, gates = example()
    with pytest.raises(NotImplementedError, match="Lp gives no proximal map"):
        Lp(3.0).proximal(y, v, gates, gates["smoothing"])
    with pytest.raises(ValueError, match="not convex"):
        Huber("switch").proximal(y, v, gates, gates["smoothing"])
    assert not Lp(3.0).has_proximal
    assert not Envelope(L2()).has_proximal
