"""Choice (iii), the retention gate: how a memory forgets, as a link from the dual state A to the weights W.

The learner moves A linearly (decay towards an anchor, gradient steps); the retention's regulariser decides which weights
W = link(A) that means. Links act on the last two axes (d_in, d_out) of every fast weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from miras.choice import Choice, exponent, require, require_one_of

POWER_EPS = 1e-12
"""Added to sums and means of powers |A|^q, so that the scale links are defined at A = 0."""


@dataclass(frozen=True)
class Retention(Choice, abstract=True):
    """A link A -> W, its inverse, and its tangent.

    Facts: `identity` means that link(A) is A; `scales` that it is A times one number a matrix, tangent(A, A); `settles` that
    the state itself changes at window ends (see `settle`); `logits` that A holds unconstrained logits, drawn directly at
    initialisation, of which W is a function; `simplex` that each output unit's inputs share a fixed sum, so that a weight
    with one input could not learn.
    Its `symbols` are the link "W = ..." of one matrix A with n inputs, sum_in over those; then, as "A <- ...", what settles.
    """

    family: ClassVar[str] = "retention"
    identity: ClassVar[bool] = False
    scales: ClassVar[bool] = False
    settles: ClassVar[bool] = False
    logits: ClassVar[bool] = False
    simplex: ClassVar[bool] = False

    def link(self, dual: Tensor) -> Tensor:
        """W for A of shape [..., d_in, d_out]."""
        raise NotImplementedError

    def unlink(self, weight: Tensor) -> Tensor:
        """An A with link(A) == W. Raises ValueError where there is none."""
        raise NotImplementedError

    def tangent(self, dual: Tensor, weight: Tensor) -> Tensor:
        """kappa [..., 1, 1], the scalar slope of the link at A, where `weight` is link(A)."""
        raise NotImplementedError

    def settle(self, dual: Tensor) -> Tensor:
        """What becomes of A at a window end."""
        return dual


@dataclass(frozen=True)
class L2(Retention):
    """Weight decay, W = A: regulariser 1/2 ||W||^2 (or ||W - W_0||^2 by the anchor). Source: Miras Sec. 3.2, Eq. 12."""

    identity: ClassVar[bool] = True

    @property
    def symbols(self) -> str:
        return "W = A"

    def link(self, dual: Tensor) -> Tensor:
        return dual

    def unlink(self, weight: Tensor) -> Tensor:
        return weight

    def tangent(self, dual: Tensor, weight: Tensor) -> Tensor:
        return dual.new_ones((1, 1))


@dataclass(frozen=True)
class Lq(Retention):
    """l_q retention as printed: W = A / ||A||_q^(q-2) over each weight matrix.

    At q = 4 it has degree -1 (10 A gives W / 10) and is singular at A = 0, where POWER_EPS bounds it.
    Source: Miras Sec. 5.2, variant 3, and Eq. 24 (Moneta), as printed.
    """

    q: float = 4.0

    scales: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.q >= 2, f"Lq q={self.q}; must be at least 2 (q = 2 is L2)")

    @property
    def symbols(self) -> str:
        return f"W = A / (sum |A|{exponent(self.q)}){exponent(self.q - 2, self.q)}"

    def link(self, dual: Tensor) -> Tensor:
        return dual * self.tangent(dual, dual)

    def unlink(self, weight: Tensor) -> Tensor:
        require(self.q != 3, "Lq(q=3) keeps only the direction of A, so it has no inverse; use LqRms or LqMirror")
        norm = _power_sum(weight, self.q).pow(1 / self.q)
        return weight * norm.pow((self.q - 2) / (3 - self.q))

    def tangent(self, dual: Tensor, weight: Tensor) -> Tensor:
        return _power_sum(dual, self.q).pow((2 - self.q) / self.q)


@dataclass(frozen=True)
class LqRms(Retention):
    """l_q retention on power means: W = scale A / mean(|A|^q)^((q-2)/q), whose size is independent of the matrix's.

    Source: Miras Sec. 5.2, corrected: the printed sum makes W shrink as the matrix grows.
    """

    q: float = 4.0
    scale: float = 1.0

    scales: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.q >= 2, f"LqRms q={self.q}; must be at least 2 (q = 2 is L2)")
        require(self.scale > 0, f"LqRms scale={self.scale}; must be positive")

    @property
    def symbols(self) -> str:
        scale = "" if self.scale == 1 else f"{self.scale:g} "
        return f"W = {scale}A / mean(|A|{exponent(self.q)}){exponent(self.q - 2, self.q)}"

    def link(self, dual: Tensor) -> Tensor:
        return dual * self.tangent(dual, dual)

    def unlink(self, weight: Tensor) -> Tensor:
        require(self.q != 3, "LqRms(q=3) keeps only the direction of A, so it has no inverse; choose another q")
        rms = _power_mean(weight / self.scale, self.q).pow(1 / self.q)
        return weight / self.scale * rms.pow((self.q - 2) / (3 - self.q))

    def tangent(self, dual: Tensor, weight: Tensor) -> Tensor:
        return self.scale * _power_mean(dual, self.q).pow((2 - self.q) / self.q)


@dataclass(frozen=True)
class LqMirror(Retention):
    """The true mirror map of 1/2 ||W||_r^2, r = q / (q - 1): W = A |A|^(q-2) / ||A||_q^(q-2), of degree 1.

    q is the dual exponent, as in Moneta's formula. Source: Miras Sec. 5.2, corrected (mirror descent with p-norms,
    Grove, Littlestone and Schuurmans 2001).
    """

    q: float = 4.0

    def __post_init__(self) -> None:
        require(self.q >= 2, f"LqMirror q={self.q}; must be at least 2 (q = 2 is L2)")

    @property
    def symbols(self) -> str:
        return f"W = A |A|{exponent(self.q - 2)} / (sum |A|{exponent(self.q)}){exponent(self.q - 2, self.q)}"

    def link(self, dual: Tensor) -> Tensor:
        size = _power_sum(dual, self.q).pow(1 / self.q)
        # Away from 0, where the power's own slope is infinite for q < 3.
        return dual * (dual / size).abs().clamp_min(POWER_EPS).pow(self.q - 2)

    def unlink(self, weight: Tensor) -> Tensor:
        r = self.q / (self.q - 1)
        size = _power_sum(weight, r).pow(1 / r)
        return weight.sign() * (weight / size).abs().pow(r - 1) * size

    def tangent(self, dual: Tensor, weight: Tensor) -> Tensor:
        overlap = (weight * dual).sum((-2, -1), keepdim=True)
        return overlap / (dual.square().sum((-2, -1), keepdim=True) + POWER_EPS)


@dataclass(frozen=True)
class KL(Retention):
    """Entropy: W = mass softmax(A) over the input axis of each output unit (exponentiated gradient).

    A is recentred at window ends, which leaves W as it is (with one decay a head; decays per input channel act on the
    recentred A). mass=None is the input width, so that W is near 1.
    Source: Miras Sec. 5.2, variant 1, and Eq. 27 (Memora); softmax(a log softmax(A) - G) = softmax(a A - G).
    """

    mass: float | None = None

    settles: ClassVar[bool] = True
    logits: ClassVar[bool] = True
    simplex: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _require_mass(self.mass)

    @property
    def symbols(self) -> str:
        return f"W = {_shown(self.mass)} exp(A) / sum_in exp(A)\nA <- A - mean_in(A) at window ends"

    def link(self, dual: Tensor) -> Tensor:
        return _mass(self.mass, dual) * dual.softmax(-2)

    def unlink(self, weight: Tensor) -> Tensor:
        require(bool((weight > 0).all()), "KL needs positive weights (they lie on a simplex); SignedKL takes any sign")
        return self.settle(weight.log())

    def tangent(self, dual: Tensor, weight: Tensor) -> Tensor:
        return dual.new_full((1, 1), _mass(self.mass, dual) / dual.shape[-2])

    def settle(self, dual: Tensor) -> Tensor:
        return dual - dual.mean(-2, keepdim=True)


@dataclass(frozen=True)
class SignedKL(Retention):
    """EG+-: a positive and a negative copy share one simplex, W = mass sinh(A) / sum cosh(A) over the input axis.

    mass=None is the input width, so that W is A near 0. Computed with the largest |A| taken out, so that no A overflows.
    Source: Kivinen and Warmuth 1997 (EG+-); in Miras's terms Memora with signed weights.
    """

    mass: float | None = None

    def __post_init__(self) -> None:
        _require_mass(self.mass)

    @property
    def symbols(self) -> str:
        return f"W = {_shown(self.mass)} sinh(A) / sum_in cosh(A)"

    def link(self, dual: Tensor) -> Tensor:
        top = dual.detach().abs().amax(-2, keepdim=True)
        positive, negative = (dual - top).exp(), (-dual - top).exp()
        return _mass(self.mass, dual) * (positive - negative) / (positive + negative).sum(-2, keepdim=True)

    def unlink(self, weight: Tensor) -> Tensor:
        mass = _mass(self.mass, weight)
        n = weight.shape[-2]
        # sinh(A) = s W with s = sum cosh(A) / mass, a fixed point in s: s = sum sqrt(1 + (s W)^2) / mass.
        require(
            bool((weight.abs().sum(-2) < mass).all()),
            f"SignedKL(mass={mass:g}) needs the column sums of |W| below mass; use a larger mass, wider heads, or a "
            "smaller Inputs.weight_std",
        )
        scale = weight.new_full((*weight.shape[:-2], 1, weight.shape[-1]), n / mass)
        for _ in range(200):
            scale = (1 + (scale * weight).square()).sqrt().sum(-2, keepdim=True) / mass
        return (scale * weight).asinh()

    def tangent(self, dual: Tensor, weight: Tensor) -> Tensor:
        return dual.new_full((1, 1), _mass(self.mass, dual) / dual.shape[-2])


@dataclass(frozen=True)
class ElasticNet(Retention):
    """Lazy elastic net (FTRL): W = sign(A) max(|A| - threshold, 0). Source: Miras Sec. 5.2, variant 2 (hard forgetting)."""

    threshold: float = 0.01

    def __post_init__(self) -> None:
        require(self.threshold >= 0, f"ElasticNet threshold={self.threshold}; must not be negative")

    @property
    def symbols(self) -> str:
        return f"W = {_shrunk(self.threshold)}"

    def link(self, dual: Tensor) -> Tensor:
        return F.softshrink(dual, self.threshold)

    def unlink(self, weight: Tensor) -> Tensor:
        return weight + self.threshold * weight.sign()

    def tangent(self, dual: Tensor, weight: Tensor) -> Tensor:
        return dual.new_ones((1, 1))


@dataclass(frozen=True)
class ProximalElasticNet(L2):
    """Proximal elastic net: W = A, and A <- sign(A) max(|A| - threshold, 0) at every window end (ISTA).

    Source: Miras Sec. 5.2, variant 2, with the proximal step taken on the state.
    """

    threshold: float = 0.001

    settles: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.threshold >= 0, f"ProximalElasticNet threshold={self.threshold}; must not be negative")

    @property
    def symbols(self) -> str:
        return f"W = A\nA <- {_shrunk(self.threshold)} at window ends"

    def settle(self, dual: Tensor) -> Tensor:
        return F.softshrink(dual, self.threshold)


@dataclass(frozen=True)
class Bregman(Retention):
    """Bregman divergence of a separable regulariser by its link: "sigmoid" is W = 1 / (1 + exp(-A)) (binary entropy).

    Source: Miras Sec. 5.2, variant 4.
    """

    name: str = "sigmoid"

    logits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_one_of("Bregman name", self.name, ("sigmoid",))

    @property
    def symbols(self) -> str:
        return "W = 1 / (1 + exp(-A))"

    def link(self, dual: Tensor) -> Tensor:
        return dual.sigmoid()

    def unlink(self, weight: Tensor) -> Tensor:
        require(bool(((weight > 0) & (weight < 1)).all()), "Bregman('sigmoid') needs weights strictly between 0 and 1")
        return weight.logit()

    def tangent(self, dual: Tensor, weight: Tensor) -> Tensor:
        return dual.new_full((1, 1), 0.25)


# name -> (g = inverse of f', derivative of g, supremum of g's domain), with f'(1) = 0 and f''(1) = 1.
_DIVERGENCES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], float]] = {
    "kl": (torch.exp, torch.exp, math.inf),
    "reverse_kl": (lambda x: 1 / (1 - x), lambda x: (1 - x) ** -2, 1.0),
    "hellinger": (lambda x: (1 - x / 2) ** -2, lambda x: (1 - x / 2) ** -3, 2.0),
    "chi2": (lambda x: (1 + x).clamp_min(0), lambda x: (x > -1).to(x.dtype), math.inf),
    "jensen_shannon": (
        lambda x: (x / 2).exp() / (2 - (x / 2).exp()),
        lambda x: (x / 2).exp() / (2 - (x / 2).exp()) ** 2,
        2 * math.log(2),
    ),
}

_DIVERGENCE_SYMBOLS = {
    "kl": "exp(A - zeta)",
    "reverse_kl": "1 / (1 - (A - zeta))",
    "hellinger": "1 / (1 - (A - zeta) / 2)^2",
    "chi2": "max(1 + A - zeta, 0)",
    "jensen_shannon": "exp((A - zeta) / 2) / (2 - exp((A - zeta) / 2))",
}

_BISECTIONS = 64


@dataclass(frozen=True)
class FDivergence(Retention):
    """f-divergence from the uniform point of the simplex: W = (mass / n) g(A - zeta), g the inverse of f'.

    zeta makes each output unit's inputs sum to `mass` (None: the input width n). Names: "kl" (equal to `KL`),
    "reverse_kl", "hellinger", "chi2", "jensen_shannon", each scaled to f''(1) = 1, so that the tangent at the uniform
    point is mass / n. Source: Miras Sec. 5.2, variant 1, in its dual form.
    """

    name: str = "chi2"
    mass: float | None = None

    settles: ClassVar[bool] = True
    logits: ClassVar[bool] = True
    simplex: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_one_of("FDivergence name", self.name, tuple(_DIVERGENCES))
        _require_mass(self.mass)

    @property
    def symbols(self) -> str:
        scale = "" if self.mass is None else f"({self.mass:g}/n) "
        link = f"W = {scale}{_DIVERGENCE_SYMBOLS[self.name]}, zeta such that sum_in W = {_shown(self.mass)}"
        return f"{link}\nA <- A - mean_in(A) at window ends"

    def link(self, dual: Tensor) -> Tensor:
        g, slope, limit = _DIVERGENCES[self.name]
        n = dual.shape[-2]
        # Shifts change nothing but the rounding of A - zeta.
        dual = dual - dual.detach().amax(-2, keepdim=True)
        with torch.no_grad():
            high = dual.amax(-2, keepdim=True)
            low = torch.maximum(dual.amin(-2, keepdim=True), high - limit)
            for _ in range(_BISECTIONS):
                middle = (low + high) / 2
                above = g(dual - middle).sum(-2, keepdim=True) >= n
                low, high = torch.where(above, middle, low), torch.where(above, high, middle)
            zeta = high
            total = slope(dual - zeta).sum(-2, keepdim=True)
        # One Newton step from the root carries the implicit function's derivative.
        zeta = zeta + (g(dual - zeta).sum(-2, keepdim=True) - n) / total
        return _mass(self.mass, dual) / n * g(dual - zeta)

    def unlink(self, weight: Tensor) -> Tensor:
        ratio = weight * weight.shape[-2] / _mass(self.mass, weight)
        require(bool((ratio > 0).all()), f"FDivergence({self.name!r}) needs positive weights (they lie on a simplex)")
        inverse = {
            "kl": torch.log,
            "reverse_kl": lambda r: 1 - 1 / r,
            "hellinger": lambda r: 2 - 2 * r.rsqrt(),
            "chi2": lambda r: r - 1,
            "jensen_shannon": lambda r: 2 * (2 * r / (r + 1)).log(),
        }[self.name]
        return inverse(ratio)

    def tangent(self, dual: Tensor, weight: Tensor) -> Tensor:
        return dual.new_full((1, 1), _mass(self.mass, dual) / dual.shape[-2])

    def settle(self, dual: Tensor) -> Tensor:
        return dual - dual.mean(-2, keepdim=True)


def _power_sum(x: Tensor, q: float) -> Tensor:
    # Row by row first: a compiler fuses that with other sums along rows, such as those of gradients in rank-one terms.
    return x.abs().pow(q).sum(-1, keepdim=True).sum(-2, keepdim=True) + POWER_EPS


def _power_mean(x: Tensor, q: float) -> Tensor:
    return x.abs().pow(q).mean(-1, keepdim=True).mean(-2, keepdim=True) + POWER_EPS


def _mass(mass: float | None, dual: Tensor) -> float:
    return float(dual.shape[-2]) if mass is None else mass


def _shown(mass: float | None) -> str:
    return "n" if mass is None else f"{mass:g}"


def _shrunk(threshold: float) -> str:
    return f"sign(A) max(|A| - {threshold:g}, 0)"


def _require_mass(mass: float | None) -> None:
    require(mass is None or mass > 0, f"mass={mass}; must be positive, or None for the input width")
