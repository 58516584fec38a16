"""Choice (iv), the learning algorithm: how gradients become steps of the dual state.

Each is a small system over time on slots z = (D, ...), D = A - anchor being the first, driven by u_t = -eta_t G_t.
`step` is the definition, one token at a time, on weight matrices. A rule that is a chain of leaky integrators says so by
`chain`, and the engine turns it into block matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from miras.choice import Choice, Gate, require

DECAY_EPS = 1e-12
"""Smallest momentum factor inside a logarithm."""

Slots = tuple[Tensor, ...]
Gates = Mapping[str, Tensor]


@dataclass(frozen=True)
class Learning(Choice, abstract=True):
    """An online optimiser.

    Facts: `slots` counts the matrices of its state; `chained` says that `chain` describes it; `settles` that the slots
    change at window ends; `micro_steps` counts gradient steps a token; `parametric` is False when it keeps no weights.
    Its `symbols` are the slots' updates, D_t last.
    """

    family: ClassVar[str] = "learning"
    chained: ClassVar[bool] = True
    settles: ClassVar[bool] = False
    parametric: ClassVar[bool] = True

    @property
    def slots(self) -> int:
        return 1

    @property
    def micro_steps(self) -> int:
        return 1

    @property
    def gates(self) -> tuple[Gate, ...]:
        """The numbers per token and head that the rule reads."""
        return ()

    def step(self, z: Slots, u: Tensor, decay: Tensor, gates: Gates) -> Slots:
        """z_t from z_{t-1}: slots and u are [..., d_in, d_out]; decay (alpha_t) and gates broadcast against them."""
        raise NotImplementedError

    def chain(self, gates: Gates) -> tuple[Tensor, ...]:
        """Log-decays of the integrators that feed the one with alpha_t, each like its gate, from the outermost inwards.

        z[0] <- alpha z[0] + z[1],  z[1] <- exp(chain[0]) z[1] + z[2], ..., the last fed by u; all at the same token.
        """
        raise NotImplementedError

    def settle(self, z: Slots) -> Slots:
        """What becomes of the slots at a window end."""
        return z


@dataclass(frozen=True)
class GradientDescent(Learning):
    """Online gradient descent: D_t = alpha_t D_{t-1} - eta_t G_t. Source: Miras Sec. 3, Eq. 5."""

    @property
    def symbols(self) -> str:
        return "D_t = alpha_t D_{t-1} + u_t"

    def step(self, z: Slots, u: Tensor, decay: Tensor, gates: Gates) -> Slots:
        return (decay * z[0] + u,)

    def chain(self, gates: Gates) -> tuple[Tensor, ...]:
        return ()


@dataclass(frozen=True)
class Momentum(Learning):
    """Momentum: S_t = mu_t S_{t-1} - eta_t G_t,  D_t = alpha_t D_{t-1} + S_t; gate mu in [0, 1].

    Block paths work with log mu, so the gradient in mu needs mu well above 0 (in float32 its relative error is 4e-4 at
    1e-4); a sigmoid gate's own slope vanishes there anyway. Outputs hold down to mu = 0.

    Source: Titans (arXiv 2501.00663) Eq. 13-14.
    """

    @property
    def slots(self) -> int:
        return 2

    @property
    def symbols(self) -> str:
        return "S_t = mu_t S_{t-1} + u_t\nD_t = alpha_t D_{t-1} + S_t"

    @property
    def gates(self) -> tuple[Gate, ...]:
        return (Gate("mu", initial=0.5, maximum=1.0),)

    def step(self, z: Slots, u: Tensor, decay: Tensor, gates: Gates) -> Slots:
        momentum = gates["mu"] * z[1] + u
        return (decay * z[0] + momentum, momentum)

    def chain(self, gates: Gates) -> tuple[Tensor, ...]:
        return (gates["mu"].clamp_min(DECAY_EPS).log(),)


@dataclass(frozen=True)
class MultiStep(Learning):
    """n gradient steps a token on n pairs (k, v): decay on the first, read on the last.

    Inputs k, v, lr and the gates have T * n positions, q and log_decay T; `refresh` counts gradient steps.
    Source: DeltaProduct (arXiv 2502.10297) Eq. 4-5.
    """

    n: int = 2

    def __post_init__(self) -> None:
        require(self.n >= 1, f"MultiStep n={self.n}; must be at least 1 gradient step a token")

    @property
    def micro_steps(self) -> int:
        return self.n

    @property
    def symbols(self) -> str:
        steps = [f"u_t{j}" for j in range(1, self.n + 1)]
        shown = steps if self.n <= 3 else [steps[0], "..", steps[-1]]
        return f"D_t = alpha_t D_{{t-1}} + {' + '.join(shown)}"

    def step(self, z: Slots, u: Tensor, decay: Tensor, gates: Gates) -> Slots:
        return (decay * z[0] + u,)

    def chain(self, gates: Gates) -> tuple[Tensor, ...]:
        return ()


@dataclass(frozen=True)
class Omega(Learning):
    """Sliding window of gradients: D_t = alpha_t D_{t-1} - sum_{i = t-window+1}^{t} eta_i G_i.

    Source: Atlas (arXiv 2505.23735) Eq. 9, with the gradients of past tokens kept as they were taken.
    """

    window: int = 4

    chained: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(self.window >= 1, f"Omega window={self.window}; must be at least 1 (1 is GradientDescent)")

    @property
    def slots(self) -> int:
        return self.window

    @property
    def symbols(self) -> str:
        past = [f" + u_{{t-{i}}}" for i in range(1, self.window)]
        shown = past if self.window <= 3 else [" + ..", past[-1]]
        return f"D_t = alpha_t D_{{t-1}} + u_t{''.join(shown)}"

    def step(self, z: Slots, u: Tensor, decay: Tensor, gates: Gates) -> Slots:
        total = decay * z[0] + u
        for past in z[1:]:
            total = total + past
        return (total, u, *z[1:-1]) if self.window > 1 else (total,)


@dataclass(frozen=True)
class Muon(Momentum):
    """Momentum that enters D orthogonalised at window ends, by Newton-Schulz, keeping its Frobenius norm.

    D_t = alpha_t D_{t-1} + ||S_t||_F NS(S_t) / sqrt(min(d_in, d_out)) at a window end; S itself stays as it is, and inside
    a window the rule is `Momentum`. Source: Muon (Jordan 2024) for the quintic iteration, Atlas (arXiv 2505.23735) Sec. 5;
    the norm is kept so that the rate keeps its meaning and an idle memory stays idle.
    """

    steps: int = 5

    chained: ClassVar[bool] = False
    settles: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.steps >= 1, f"Muon steps={self.steps}; must be at least 1 Newton-Schulz iteration")

    @property
    def symbols(self) -> str:
        momentum, plain = super().symbols.splitlines()
        whole = "D_t = alpha_t D_{t-1} + ||S_t|| NS(S_t) / sqrt(min(d_in, d_out))"
        return f"{momentum}\n{plain} inside a window\n{whole} at its end"

    def settle(self, z: Slots) -> Slots:
        return (z[0] - z[1] + orthogonalize(z[1], self.steps), z[1])


@dataclass(frozen=True)
class NonParametric(Learning):
    """No fast weights: softmax attention, the Nadaraya-Watson solution, over the last `window` tokens (None: all).

    o_t = sum_i softmax_i(<q_t, k_i> / sqrt(K)) v_i, i in (t - window, t]. Source: Miras Sec. 4, Eq. 10.
    """

    window: int | None = None

    chained: ClassVar[bool] = False
    parametric: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(self.window is None or self.window >= 1, f"NonParametric window={self.window}; must be at least 1")

    @property
    def symbols(self) -> str:
        seen = "i <= t" if self.window is None else f"t - {self.window} < i <= t"
        return f"o_t = sum_i softmax_i(<q_t, k_i> / sqrt(K)) v_i, {seen}"


def orthogonalize(x: Tensor, steps: int) -> Tensor:
    """Newton-Schulz (quintic) towards the nearest semi-orthogonal matrix, rescaled to x's Frobenius norm."""
    a, b, c = 3.4445, -4.7750, 2.0315
    norm = (x.square().sum((-2, -1), keepdim=True) + DECAY_EPS).sqrt()
    y = x / norm
    tall = y.shape[-2] > y.shape[-1]
    y = y.mT if tall else y
    for _ in range(steps):
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    y = y.mT if tall else y
    return y * norm / min(x.shape[-2:]) ** 0.5
