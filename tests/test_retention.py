"""Retentions: links, their inverses and tangents, and the regularisers they come from."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from miras.retention import (
    KL,
    L2,
    Bregman,
    ElasticNet,
    FDivergence,
    Lq,
    LqMirror,
    LqRms,
    ProximalElasticNet,
    Retention,
    SignedKL,
)
from tests.problems import assert_close

DIVERGENCES = ("kl", "reverse_kl", "hellinger", "chi2", "jensen_shannon")

RETENTIONS: dict[str, Retention] = {
    "L2": L2(),
    "Lq 2": Lq(2.0),
    "Lq 2.5": Lq(2.5),
    "Lq 4": Lq(4.0),
    "LqRms 4": LqRms(4.0),
    "LqRms 3.5": LqRms(3.5, 0.3),
    "LqMirror 2": LqMirror(2.0),
    "LqMirror 2.5": LqMirror(2.5),
    "LqMirror 3": LqMirror(3.0),
    "LqMirror 4": LqMirror(4.0),
    "KL": KL(),
    "KL mass": KL(7.0),
    "SignedKL": SignedKL(),
    "SignedKL mass": SignedKL(9.0),
    "ElasticNet": ElasticNet(0.1),
    "ProximalElasticNet": ProximalElasticNet(0.1),
    "sigmoid": Bregman("sigmoid"),
    **{name: FDivergence(name) for name in DIVERGENCES},
    **{f"{name} mass": FDivergence(name, 2.5) for name in DIVERGENCES},
}

SIMPLEX = [name for name, x in RETENTIONS.items() if isinstance(x, (KL, FDivergence))]


def duals(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*(shape or (2, 5, 3)), dtype=torch.float64)


def mass_of(x: Retention, n: int) -> float:
    mass = getattr(x, "mass", None)
    return n if mass is None else mass


@pytest.mark.parametrize("name", RETENTIONS)
def test_link_undoes_unlink(name: str) -> None:
    x = RETENTIONS[name]
    weight = x.link(duals(scale=0.5))
    if isinstance(x, (KL, FDivergence)):
        weight = weight.clamp_min(1e-3)
        weight = weight / weight.sum(-2, keepdim=True) * mass_of(x, 5)
    assert_close(x.link(x.unlink(weight)), weight, name)


@pytest.mark.parametrize("name", RETENTIONS)
def test_identity_is_true(name: str) -> None:
    x, a = RETENTIONS[name], duals()
    assert x.identity == torch.equal(x.link(a), a) or name in ("Lq 2", "LqMirror 2")  # q = 2 is L2, under another name
    if x.identity:
        assert float(x.tangent(a, a)) == 1.0


@pytest.mark.parametrize("name", RETENTIONS)
def test_scales_is_true(name: str) -> None:
    x, a = RETENTIONS[name], duals()
    scaled = x.tangent(a, a) * a
    found = scaled.shape == a.shape and torch.allclose(x.link(a), scaled, rtol=1e-12, atol=0)
    assert (x.scales or x.identity) == found or name == "LqMirror 2"


@pytest.mark.parametrize("name", RETENTIONS)
def test_settles_is_true(name: str) -> None:
    x, a = RETENTIONS[name], duals()
    assert x.settles == (not torch.equal(x.settle(a), a))
    assert_close(x.settle(x.settle(a)), x.settle(a)) if not isinstance(x, ProximalElasticNet) else None
    if isinstance(x, (KL, FDivergence)):
        assert_close(x.link(x.settle(a)), x.link(a), "settling leaves W as it is")
        assert_close(x.settle(a).mean(-2), torch.zeros(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("name", RETENTIONS)
def test_link_by_finite_differences(name: str) -> None:
    a = duals(4, 2).requires_grad_()
    assert torch.autograd.gradcheck(RETENTIONS[name].link, a)
    assert torch.autograd.gradcheck(lambda a: RETENTIONS[name].tangent(a, RETENTIONS[name].link(a)) + 0 * a.sum(), a)


@pytest.mark.parametrize("name", RETENTIONS)
def test_matrices_do_not_mix(name: str) -> None:
    """A link works on the last two axes only."""
    x, a = RETENTIONS[name], duals(3, 2, 5, 4)
    assert_close(x.link(a)[1, 0], x.link(a[1, 0]), name)
    kappa = x.tangent(a, x.link(a)).expand(3, 2, 1, 1)
    assert_close(kappa[1, 0], x.tangent(a[1, 0], x.link(a[1, 0])), name)


def slope_along(link: Callable[[Tensor], Tensor], a: Tensor, direction: Tensor) -> Tensor:
    return torch.autograd.functional.jvp(link, a, direction)[1]


@pytest.mark.parametrize("name", RETENTIONS)
def test_tangent_is_the_printed_kappa(name: str) -> None:
    x, a = RETENTIONS[name], duals(5, 3)
    kappa = x.tangent(a, x.link(a))
    size = lambda q: a.abs().pow(q).sum() ** (1 / q)  # noqa: E731
    expected = {
        L2: lambda: 1.0,
        Lq: lambda: size(x.q) ** -(x.q - 2),
        LqRms: lambda: x.scale / a.abs().pow(x.q).mean() ** ((x.q - 2) / x.q),
        LqMirror: lambda: (x.link(a) * a).sum() / (a * a).sum(),
        Bregman: lambda: 0.25,
        ElasticNet: lambda: 1.0,
        ProximalElasticNet: lambda: 1.0,
    }.get(type(x), lambda: mass_of(x, 5) / 5)()
    assert float(kappa) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("name", RETENTIONS)
def test_tangent_is_the_derivative_where_it_can_be(name: str) -> None:
    """At A = 0 for the simplices (on changes of A that keep its mean), the sigmoid and the identities; beyond the
    threshold for the soft ones; orthogonally to the matrix for the scale links."""
    x, zero = RETENTIONS[name], torch.zeros(5, 3, dtype=torch.float64)
    d = duals(5, 3)
    if isinstance(x, (KL, FDivergence)):
        d = d - d.mean(-2, keepdim=True)
    a = zero
    if isinstance(x, ElasticNet):
        a = duals(5, 3).sign() * 0.7
    if isinstance(x, (Lq, LqRms)):
        a = duals(5, 3)
        normal = a * a.abs().pow(x.q - 2)
        d = d - (d * normal).sum() / (normal * normal).sum() * normal
    if isinstance(x, LqMirror):
        # The slope of W along A itself, which degree 1 makes exact.
        a = duals(5, 3)
        along = slope_along(x.link, a, a)
        assert_close(along, x.link(a))
        assert float((along * a).sum() / (a * a).sum()) == pytest.approx(float(x.tangent(a, x.link(a))))
        return
    assert_close(slope_along(x.link, a, d), x.tangent(a, x.link(a)) * d, name)


def test_degrees() -> None:
    a = duals()
    assert_close(Lq(4.0).link(10 * a), Lq(4.0).link(a) / 10, "printed, q = 4: degree -1")
    assert_close(Lq(3.0).link(10 * a), Lq(3.0).link(a), "printed, q = 3: degree 0")
    assert_close(LqRms(4.0).link(10 * a), LqRms(4.0).link(a) / 10)
    for q in (2.0, 2.5, 3.0, 4.0, 6.0):
        assert_close(LqMirror(q).link(10 * a), 10 * LqMirror(q).link(a), "mirror: degree 1")


def test_root_mean_powers_do_not_see_the_size() -> None:
    a = duals(4, 3)
    tiled = a.repeat(3, 2)
    assert_close(LqRms(4.0, 0.2).link(tiled)[:4, :3], LqRms(4.0, 0.2).link(a))
    assert float((Lq(4.0).link(tiled)[:4, :3] - Lq(4.0).link(a)).abs().max()) > 1e-2
    assert_close(LqRms(4.0, 0.6).link(a), 3 * LqRms(4.0, 0.2).link(a))


@pytest.mark.parametrize("q", [2.0, 2.5, 3.0, 4.0])
def test_mirror_map_of_half_the_squared_norm(q: float) -> None:
    """link is the gradient of 1/2 ||A||_q^2, the conjugate of 1/2 ||W||_r^2, whose gradient is unlink."""
    x, r = LqMirror(q), q / (q - 1)
    a = duals(5, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(0.5 * a.abs().pow(q).sum().pow(2 / q), a)
    assert_close(x.link(a), gradient)
    w = x.link(a).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(0.5 * w.abs().pow(r).sum().pow(2 / r), w)
    assert_close(x.unlink(w), gradient)
    assert_close(gradient, a)


def test_softmax_identity() -> None:
    """softmax(alpha log softmax(A) - G) = softmax(alpha A - G): A needs no normalising."""
    a, g, alpha = duals(), duals(), 0.7
    x = KL()
    step = alpha * (x.link(a) / 5).log() - g
    assert_close(x.link(step), x.link(alpha * a - g))
    assert_close(x.link(a), 5 * a.softmax(-2))
    assert_close(KL(2.0).link(a), 2 * a.softmax(-2))


def test_signed_simplex() -> None:
    """A positive and a negative copy share one simplex; near 0 W is A; no A overflows."""
    a = duals()
    both = torch.cat((a, -a), dim=-2).softmax(-2)
    assert_close(SignedKL(4.0).link(a), 4.0 * (both[:, :5] - both[:, 5:]))
    assert_close(SignedKL().link(1e-5 * a), 1e-5 * a, tolerance=1e-13)
    assert_close(SignedKL(4.0).link(a), 4 * a.sinh() / a.cosh().sum(-2, keepdim=True))
    assert_close(SignedKL().link(-a), -SignedKL().link(a))


@pytest.mark.parametrize("name", RETENTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_and_zero_duals_are_finite(name: str, dtype: torch.dtype) -> None:
    """W and its gradient at |A| = 1e4 and at A = 0, where every eps is at its edge."""
    x = RETENTIONS[name]
    for a in (1e4 * torch.randn(6, 4, dtype=dtype), torch.zeros(6, 4, dtype=dtype), 1e-30 * torch.ones(6, 4, dtype=dtype)):
        a = a.requires_grad_()
        w = x.link(a)
        (gradient,) = torch.autograd.grad(w.sum(), a)
        assert torch.isfinite(w).all()
        assert torch.isfinite(gradient).all()
        assert torch.isfinite(x.tangent(a, w)).all()


@pytest.mark.parametrize("name", SIMPLEX)
def test_on_the_simplex(name: str) -> None:
    x = RETENTIONS[name]
    for a in (duals(), duals(scale=20.0), torch.zeros(2, 5, 3, dtype=torch.float64)):
        w = x.link(a)
        assert float(w.min()) >= 0
        assert_close(w.sum(-2), torch.full((2, 3), mass_of(x, 5), dtype=torch.float64), name)
        assert_close(x.link(a + torch.randn(2, 1, 3, dtype=torch.float64)), w, "shifts of a column change nothing")
    assert_close(x.link(torch.zeros(5, 3, dtype=torch.float64)), torch.full((5, 3), mass_of(x, 5) / 5, dtype=torch.float64))


@pytest.mark.parametrize("name", SIMPLEX)
def test_mass_in_float32(name: str) -> None:
    """Kept to rounding, however large A is and wherever it lies."""
    x = RETENTIONS[name]
    for a in (duals(16, 8), duals(16, 8) + 1e3, duals(16, 8, scale=100.0), duals(16, 8, scale=1e4)):
        total = x.link(a.float()).sum(-2)
        assert_close(total, torch.full_like(total, mass_of(x, 16)), name, tolerance=2e-5)


F = {
    "kl": lambda r: torch.xlogy(r, r) - r + 1,
    "reverse_kl": lambda r: r - r.log() - 1,
    "hellinger": lambda r: 2 * (r.sqrt() - 1) ** 2,
    "chi2": lambda r: 0.5 * (r - 1) ** 2,
    "jensen_shannon": lambda r: 2 * (torch.xlogy(r, r) - (r + 1) * ((r + 1) / 2).log()),
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_are_scaled_alike(name: str) -> None:
    """f(1) = f'(1) = 0 and f''(1) = 1."""
    one = torch.ones((), dtype=torch.float64, requires_grad=True)
    f = F[name](one)
    (first,) = torch.autograd.grad(f, one, create_graph=True)
    (second,) = torch.autograd.grad(first, one)
    assert (float(f.detach()), float(first.detach()), float(second)) == pytest.approx((0, 0, 1), abs=1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("mass", [None, 2.5])
def test_divergence_link_minimises(name: str, mass: float | None) -> None:
    """W = argmin <W, -A> + (mass / n) sum f(W n / mass) over W >= 0 with columns that sum to mass."""
    x, a, n = FDivergence(name, mass), duals(6, 4, scale=1.5), 6
    total = mass_of(x, n)
    w = x.link(a)

    def objective(w: Tensor) -> Tensor:
        return -(w * a).sum(0) + total / n * F[name](w * n / total).sum(0)

    best = objective(w)
    for _ in range(200):
        other = total * (duals(6, 4, scale=3.0)).softmax(0)
        for share in (1.0, 0.1, 1e-3):
            assert float((best - objective(w + share * (other - w))).max()) <= 1e-11
    logits = w.clamp_min(1e-6).log().requires_grad_()
    search = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-13, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        search.zero_grad()
        value = objective(total * logits.softmax(0)).sum()
        value.backward()
        return value

    with torch.no_grad():
        logits += 0.3 * torch.randn_like(logits)
    search.step(closure)
    assert_close(total * logits.softmax(0), w, name, tolerance=1e-4)


def test_kl_divergence_is_kl() -> None:
    a = duals(2, 6, 3, scale=2.0).requires_grad_()
    for mass in (None, 3.0):
        w, expected = FDivergence("kl", mass).link(a), KL(mass).link(a)
        assert_close(w, expected)
        probe = torch.randn_like(w)
        (actual,) = torch.autograd.grad((w * probe).sum(), a)
        (wanted,) = torch.autograd.grad((expected * probe).sum(), a)
        assert_close(actual, wanted)


def test_elastic_nets() -> None:
    a = torch.tensor([[0.3, -0.05, -0.4, 0.1]], dtype=torch.float64)
    soft = torch.tensor([[0.2, 0.0, -0.3, 0.0]], dtype=torch.float64)
    assert_close(ElasticNet(0.1).link(a), soft)
    assert_close(ElasticNet(0.1).settle(a), a)
    assert_close(ProximalElasticNet(0.1).link(a), a)
    assert_close(ProximalElasticNet(0.1).settle(a), soft)


def test_sigmoid() -> None:
    a = duals()
    assert_close(Bregman("sigmoid").link(a), 1 / (1 + (-a).exp()))


def test_power_eps_at_its_edge() -> None:
    """Lq as printed is singular at 0; the eps bounds kappa there by eps^-((q-2)/q), 1e6 at q = 4."""
    zero = torch.zeros(3, 3, dtype=torch.float64)
    for x in (Lq(4.0), LqRms(4.0)):
        assert float(x.tangent(zero, zero)) == pytest.approx(1e6)
        assert float(x.link(zero).abs().max()) == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Lq(1.5), "Lq q=1.5; must be at least 2"),
        (lambda: LqRms(1.0), "LqRms q=1.0; must be at least 2"),
        (lambda: LqRms(4.0, 0.0), "scale=0.0; must be positive"),
        (lambda: LqMirror(1.0), "LqMirror q=1.0; must be at least 2"),
        (lambda: KL(0.0), "mass=0.0; must be positive, or None"),
        (lambda: SignedKL(-1.0), "mass=-1.0; must be positive"),
        (lambda: FDivergence("chi2", -1.0), "mass=-1.0; must be positive"),
        (lambda: FDivergence("chi"), "name='chi'; allowed: 'kl', 'reverse_kl'"),
        (lambda: ElasticNet(-0.1), "threshold=-0.1; must not be negative"),
        (lambda: ProximalElasticNet(-0.1), "threshold=-0.1; must not be negative"),
        (lambda: Bregman("tanh"), "name='tanh'; allowed: 'sigmoid'"),
        (lambda: Lq(3.0).unlink(torch.ones(2, 2)), "only the direction"),
        (lambda: LqRms(3.0).unlink(torch.ones(2, 2)), "only the direction"),
        (lambda: KL().unlink(-torch.ones(2, 2)), "positive weights"),
        (lambda: FDivergence().unlink(torch.zeros(2, 2)), "positive weights"),
        (lambda: SignedKL(1.0).unlink(torch.ones(2, 2)), "column sums"),
        (lambda: Bregman().unlink(torch.ones(2, 2)), "between 0 and 1"),
    ],
)
def test_illegal_values(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", RETENTIONS)
def test_logits_are_functions_of_the_state_alone(name: str) -> None:
    """`logits` marks the links whose W cannot be zero or of any sign, so that A_0 is drawn instead of W_0."""
    x = RETENTIONS[name]
    positive = bool((x.link(duals(scale=2.0)) >= 0).all())
    assert x.logits == positive


def test_mass_of_chi2_with_zeros() -> None:
    """Far columns are clipped: the projection onto the simplex, W = max(0, 1 + A - zeta)."""
    a = torch.tensor([[3.0], [0.0], [-3.0]], dtype=torch.float64)
    assert_close(FDivergence("chi2").link(a), torch.tensor([[3.0], [0.0], [0.0]], dtype=torch.float64))
    assert math.isclose(float(FDivergence("chi2").link(a / 3).sum()), 3.0)
