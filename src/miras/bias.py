"""Choice (ii), the attentional bias: the inner loss l(y, v) of a prediction y against a value v.

With e = y - v. A bias gives its `loss`; the engine differentiates it unless a closed-form `gradient` is given too
(tested against the loss). Gates arrive as tensors [..., 1] that broadcast against y [..., V].
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from miras.choice import Choice, Gate, exponent, quotient, require, require_one_of

Gates = Mapping[str, Tensor]

LP_EPS = 1e-6
"""Added to e^2 inside Lp, so that its gradient is smooth at e = 0 for every p >= 1."""

NORM_EPS = 1e-12
"""Added to ||e||^2 under a square root, so that norms have a finite gradient at e = 0."""


@dataclass(frozen=True)
class Bias(Choice, abstract=True):
    """An inner loss, summed over the value axis.

    Facts: `slope` says how the gradient depends on y: "constant" (not at all), "affine" (c_t (y - y0_t) with one
    number c_t >= 0 a token that depends on the gates only) or "general". `implicit` means that it reads the gate
    "smoothing" = eta_t ||k_t||^2, which the engine supplies. Its `symbols` are the loss "l = ..." and the gradient
    "g = ..." in y, v and e = y - v.
    """

    family: ClassVar[str] = "bias"
    slope: ClassVar[Literal["constant", "affine", "general"]] = "general"
    implicit: ClassVar[bool] = False

    @property
    def gates(self) -> tuple[Gate, ...]:
        """The numbers per token and head that the loss reads."""
        return ()

    def loss(self, y: Tensor, v: Tensor, gates: Gates) -> Tensor:
        """l(y, v), shape [...] for y and v of shape [..., V]."""
        raise NotImplementedError

    def gradient(self, y: Tensor, v: Tensor, gates: Gates) -> Tensor:
        """d l / d y, shape [..., V]; by automatic differentiation unless a bias overrides it."""
        outer = torch.is_grad_enabled()
        with torch.enable_grad():
            point = y if y.requires_grad else y.detach().requires_grad_()
            (grad,) = torch.autograd.grad(self.loss(point, v, gates).sum(), point, create_graph=outer)
        return grad

    def implicit_gradient(self, y: Tensor, v: Tensor, gates: Gates, step: Tensor) -> Tensor:
        """(y - proximal(y)) / step in a closed form that holds at step = 0 too; needed by `Envelope` only."""
        raise NotImplementedError(f"{self.kind} gives no proximal map")

    def proximal(self, y: Tensor, v: Tensor, gates: Gates, step: Tensor) -> Tensor:
        """argmin_p l(p, v) + ||p - y||^2 / (2 step), for step [..., 1] >= 0."""
        return y - step * self.implicit_gradient(y, v, gates, step)

    @property
    def has_proximal(self) -> bool:
        """Whether the bias gives its proximal map."""
        return type(self).implicit_gradient is not Bias.implicit_gradient


@dataclass(frozen=True)
class Dot(Bias):
    """Dot-product similarity: l = -<y, v>, gradient -v (Hebbian rule). Source: Miras Sec. 4, Eq. 6."""

    slope: ClassVar[Literal["constant", "affine", "general"]] = "constant"

    @property
    def symbols(self) -> str:
        return "l = -<y, v>\ng = -v"

    def loss(self, y: Tensor, v: Tensor, gates: Gates) -> Tensor:
        return -(y * v).sum(-1)

    def gradient(self, y: Tensor, v: Tensor, gates: Gates) -> Tensor:
        return -v.expand_as(y)

    def implicit_gradient(self, y: Tensor, v: Tensor, gates: Gates, step: Tensor) -> Tensor:
        return -v.expand_as(y)


@dataclass(frozen=True)
class L2(Bias):
    """Regression: l = 1/2 ||e||^2, gradient e (delta rule). Source: Miras Sec. 4, Eq. 8."""

    slope: ClassVar[Literal["constant", "affine", "general"]] = "affine"

    @property
    def symbols(self) -> str:
        return "l = 1/2 ||e||^2\ng = e"

    def loss(self, y: Tensor, v: Tensor, gates: Gates) -> Tensor:
        return 0.5 * (y - v).square().sum(-1)

    def gradient(self, y: Tensor, v: Tensor, gates: Gates) -> Tensor:
        return y - v

    def implicit_gradient(self, y: Tensor, v: Tensor, gates: Gates, step: Tensor) -> Tensor:
        return (y - v) / (1 + step)


@dataclass(frozen=True)
class RidgeDot(Bias):
    """Dot-product similarity with a ridge on the prediction: l = c/2 ||y||^2 - <y, v>, gradient c y - v; gate c ("ridge").

    c = 1 is `L2` up to a constant, c = 0 is `Dot`; one learner can so remove at one key and write at another, as RWKV-7
    does (with v = 0 and c = 1 it forgets what the memory holds at k). Source: RWKV-7 (arXiv 2503.14456) Sec. 4.1.
    """

    slope: ClassVar[Literal["constant", "affine", "general"]] = "affine"

    @property
    def symbols(self) -> str:
        return "l = 1/2 ridge_t ||y||^2 - <y, v>\ng = ridge_t y - v"

    @property
    def gates(self) -> tuple[Gate, ...]:
        return (Gate("ridge", initial=1.0),)

    def loss(self, y: Tensor, v: Tensor, gates: Gates) -> Tensor:
        return 0.5 * gates["ridge"].squeeze(-1) * y.square().sum(-1) - (y * v).sum(-1)

    def gradient(self, y: Tensor, v: Tensor, gates: Gates) -> Tensor:
        return gates["ridge"] * y - v

    def implicit_gradient(self, y: Tensor, v: Tensor, gates: Gates, step: Tensor) -> Tensor:
        return (gates["ridge"] * y - v) / (1 + step * gates["ridge"])


@dataclass(frozen=True)
class Lp(Bias):
    """l_p regression: l = 1/p sum (e^2 + 1e-6)^(p/2), gradient e (e^2 + 1e-6)^(p/2 - 1).

    Corrected: the paper's tanh and square-root smoothing of sign(e) and |e| becomes the 1e-6, and its factor p is
    absorbed in the rate. Source: Miras Sec. 5.1, variant 1 (Moneta uses p = 3).
    """

    p: float = 3.0

    def __post_init__(self) -> None:
        require(self.p >= 1, f"Lp p={self.p}; must be at least 1 for the loss to be convex")

    @property
    def symbols(self) -> str:
        return f"l = {quotient(1, self.p)} sum |e|{exponent(self.p)}\ng = sign(e) |e|{exponent(self.p - 1)}"

    def loss(self, y: Tensor, v: Tensor, gates: Gates) -> Tensor:
        return ((y - v).square() + LP_EPS).pow(self.p / 2).sum(-1) / self.p

    def gradient(self, y: Tensor, v: Tensor, gates: Gates) -> Tensor:
        e = y - v
        return e * (e.square() + LP_EPS).pow(self.p / 2 - 1)


@dataclass(frozen=True)
class Huber(Bias):
    """Huber loss with a threshold delta_t >= 0 a token and head: quadratic for small errors, linear for large ones.

    form "coordinate": sum of h(e_j), gradient clamp(e, -delta, delta).
    form "norm":       h(||e||), gradient e min(1, delta / ||e||).
    form "switch":     gradient e if ||e|| <= delta, else delta sign(e), as printed for Yaad; its loss is
                       1/2 ||e||^2 or delta ||e||_1, which jumps at the border.
    Source: Miras Sec. 5.1, variant 2.
    """

    form: str = "switch"

    def __post_init__(self) -> None:
        require_one_of("Huber form", self.form, ("coordinate", "norm", "switch"))

    @property
    def symbols(self) -> str:
        return {
            "coordinate": "l = sum (1/2 e^2 if |e| <= delta_t else delta_t |e| - 1/2 delta_t^2)\n"
            "g = min(max(e, -delta_t), delta_t)",
            "norm": "l = 1/2 ||e||^2 if ||e|| <= delta_t else delta_t ||e|| - 1/2 delta_t^2\ng = e min(1, delta_t / ||e||)",
            "switch": "l = 1/2 ||e||^2 if ||e|| <= delta_t else delta_t sum |e|\n"
            "g = e if ||e|| <= delta_t else delta_t sign(e)",
        }[self.form]

    @property
    def gates(self) -> tuple[Gate, ...]:
        return (Gate("delta", initial=1.0),)

    def loss(self, y: Tensor, v: Tensor, gates: Gates) -> Tensor:
        e, delta = y - v, gates["delta"]
        square = 0.5 * e.square()
        if self.form == "coordinate":
            return torch.where(e.abs() <= delta, square, delta * (e.abs() - 0.5 * delta)).sum(-1)
        norm = _norm(e)
        if self.form == "norm":
            far = (delta * (norm - 0.5 * delta)).squeeze(-1)
        else:
            far = (delta * e.abs()).sum(-1)
        return torch.where((norm <= delta).squeeze(-1), square.sum(-1), far)

    def gradient(self, y: Tensor, v: Tensor, gates: Gates) -> Tensor:
        e, delta = y - v, gates["delta"]
        if self.form == "coordinate":
            return torch.where(e.abs() <= delta, e, delta * e.sign())
        norm = _norm(e)
        far = e * (delta / norm) if self.form == "norm" else delta * e.sign()
        return torch.where(norm <= delta, e, far)

    def implicit_gradient(self, y: Tensor, v: Tensor, gates: Gates, step: Tensor) -> Tensor:
        require(self.form != "switch", "Huber(form='switch') is not convex and has no proximal map; use form='norm'")
        e, delta = y - v, gates["delta"]
        if self.form == "coordinate":
            return torch.where(e.abs() <= delta * (1 + step), e / (1 + step), delta * e.sign())
        norm = _norm(e)
        return torch.where(norm <= delta * (1 + step), e / (1 + step), e * (delta / norm))

    @property
    def has_proximal(self) -> bool:
        return self.form != "switch"


@dataclass(frozen=True)
class Robust(Bias):
    """Regression against values that may shift by Delta_t: l = 1/2 ||e||^2 + Delta ||e||, gradient e + Delta e / ||e||.

    Source: Miras Sec. 5.1, variant 3 (memorisation robust to value shifts); ||e|| is sqrt(||e||^2 + 1e-12).
    """

    @property
    def symbols(self) -> str:
        return "l = 1/2 ||e||^2 + Delta_t ||e||\ng = e + Delta_t e / ||e||"

    @property
    def gates(self) -> tuple[Gate, ...]:
        return (Gate("Delta", initial=0.1),)

    def loss(self, y: Tensor, v: Tensor, gates: Gates) -> Tensor:
        e = y - v
        return 0.5 * e.square().sum(-1) + (gates["Delta"] * _norm(e)).squeeze(-1)

    def gradient(self, y: Tensor, v: Tensor, gates: Gates) -> Tensor:
        e = y - v
        return e + gates["Delta"] * e / _norm(e)

    def implicit_gradient(self, y: Tensor, v: Tensor, gates: Gates, step: Tensor) -> Tensor:
        e = y - v
        norm, reach = _norm(e), step * gates["Delta"]
        inside = e / torch.where(norm <= reach, step, torch.ones_like(step))
        return torch.where(norm <= reach, inside, (e + gates["Delta"] * e / norm) / (1 + step))


@dataclass(frozen=True)
class Envelope(Bias):
    """Implicit (proximal) update for a matrix memory: the Moreau envelope of another bias.

    l = min_p b(p, v) + ||p - y||^2 / (2 s),  gradient (y - prox(y)) / s,  s = eta_t ||k_t||^2.
    A gradient step of rate eta on it is the exact implicit step on b. With `L2` it is Longhorn's rate
    eta / (1 + eta ||k||^2). Source: Longhorn (arXiv 2407.14207) Eq. 4; Miras Sec. 3.2.
    """

    bias: Bias = L2()

    implicit: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(
            isinstance(self.bias, Bias) and self.bias.has_proximal,
            f"Envelope needs a bias with a proximal map; {getattr(self.bias, 'kind', self.bias)!r} gives none "
            "(Dot, L2, Huber('coordinate' or 'norm') and Robust do)",
        )

    @property
    def symbols(self) -> str:
        inner = self.bias.symbols.partition("\n")[0].removeprefix("l = ") or "b(p, v)"
        inner = re.sub(r"\by\b", "p", re.sub(r"\be\b", "p - v", re.sub(r"(?<!\|)\be\b(?!\|)", "(p - v)", inner)))
        return f"l = min_p ({inner}) + ||p - y||^2 / (2 s_t)\ng = (y - p) / s_t\ns_t = eta_t ||k_t||^2"

    @property
    def slope(self) -> Literal["constant", "affine", "general"]:  # type: ignore[override]
        return self.bias.slope

    @property
    def gates(self) -> tuple[Gate, ...]:
        return self.bias.gates

    def loss(self, y: Tensor, v: Tensor, gates: Gates) -> Tensor:
        step = gates["smoothing"]
        p = self.bias.proximal(y, v, gates, step)
        penalty = (p - y).square().sum(-1) / (2 * step.squeeze(-1).clamp_min(NORM_EPS))
        return self.bias.loss(p, v, gates) + penalty

    def gradient(self, y: Tensor, v: Tensor, gates: Gates) -> Tensor:
        return self.bias.implicit_gradient(y, v, gates, gates["smoothing"])


def _norm(e: Tensor) -> Tensor:
    return (e.square().sum(-1, keepdim=True) + NORM_EPS).sqrt()
