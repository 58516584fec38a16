"""Choice (iv), the learning algorithm: how gradients become steps of the dual state.

Each is a small system over time on slots z = (D, ...), D = A - anchor being the first, driven by u_t = -eta_t G_t.
`step` is the definition, one token at a time, on weight matrices. `system` is the same over a block of tokens, as small
matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from miras.choice import Choice, Gate, require
from miras.system import System, build_system, decay_mask

DECAY_EPS = 1e-12
"""Smallest momentum factor inside a logarithm."""

Slots = tuple[Tensor, ...]
Gates = Mapping[str, Tensor]


@dataclass(frozen=True)
class Learning(Choice, abstract=True):
    """An online optimiser.

    Facts: `slots` counts the matrices of its state; `linear` says that `system` describes it between window ends;
    `settles` that the slots change at window ends; `micro_steps` counts gradient steps a token; `parametric` is False
    when it keeps no weights. Its `symbols` are the slots' updates, D_t last.
    """

    family: ClassVar[str] = "learning"
    linear: ClassVar[bool] = True
    settles: ClassVar[bool] = False
    parametric: ClassVar[bool] = True

    @property
    def slots(self) -> int:
        return 1

    @property
    def attended(self) -> int | None:
        """Where no weights are kept: how many of the latest tokens a query sees; None for all."""
        return None

    @property
    def num_persistent(self) -> int:
        """Where no weights are kept: learned tokens that every query sees too."""
        return 0

    @property
    def micro_steps(self) -> int:
        return 1

    @property
    def gates(self) -> tuple[Gate, ...]:
        """The numbers per token and head that the rule reads."""
        return ()

    def start(self, deviation: Tensor) -> Slots:
        """The slots before the first token: D = A_0 - anchor, and nothing in the others."""
        return (deviation, *[torch.zeros_like(deviation)] * (self.slots - 1))

    def step(self, z: Slots, u: Tensor, decay: Tensor, gates: Gates) -> Slots:
        """z_t from z_{t-1}: slots and u are [..., d_in, d_out]; decay (alpha_t) and gates broadcast against them."""
        raise NotImplementedError

    def system(self, log_decay: Tensor, gates: Gates) -> System:
        """`step` over a block of b steps without a window end in it: log_decay [..., (C), b], gates broadcast against it."""
        raise NotImplementedError(f"{self.kind} gives no block matrices")

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

    def system(self, log_decay: Tensor, gates: Gates) -> System:
        return build_system((log_decay,))


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

    def system(self, log_decay: Tensor, gates: Gates) -> System:
        return build_system((log_decay, _log(gates["mu"])))


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

    def system(self, log_decay: Tensor, gates: Gates) -> System:
        return build_system((log_decay,))


@dataclass(frozen=True)
class Omega(Learning):
    """Sliding window of gradients: D_t = alpha_t D_{t-1} - sum_{i = t-window+1}^{t} eta_i G_i.

    Source: Atlas (arXiv 2505.23735) Eq. 9, with the gradients of past tokens kept as they were taken.
    """

    window: int = 4

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

    def system(self, log_decay: Tensor, gates: Gates) -> System:
        return build_system((log_decay,), self.window)


@dataclass(frozen=True)
class Muon(Momentum):
    """Momentum that enters D orthogonalised at window ends, by Newton-Schulz, keeping its Frobenius norm.

    D_t = alpha_t D_{t-1} + ||S_t||_F NS(S_t) / sqrt(min(d_in, d_out)) at a window end; S itself stays as it is, and inside
    a window the rule is `Momentum`. Source: Muon (Jordan 2024) for the quintic iteration, Atlas (arXiv 2505.23735) Sec. 5;
    the norm is kept so that the rate keeps its meaning and an idle memory stays idle.
    """

    steps: int = 5

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
class OmegaMuon(Muon):
    """Muon on the sum of the last `window` gradients.

    S_t = mu_t S_{t-1} - sum_{i = t-window+1}^{t} eta_i G_i; S enters D as in `Muon`.
    Source: Atlas (arXiv 2505.23735), its Muon update, with the gradients of past tokens kept as they were taken.
    """

    window: int = 4
    steps: int = field(default=5, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.window >= 1, f"OmegaMuon window={self.window}; must be at least 1 (1 is Muon)")

    @property
    def symbols(self) -> str:
        past = "".join(f" + u_{{t-{i}}}" for i in range(1, self.window))
        shown = past if self.window <= 3 else f" + .. + u_{{t-{self.window - 1}}}"
        return super().symbols.replace(" + u_t", f" + u_t{shown}", 1)

    @property
    def slots(self) -> int:
        return 1 + self.window

    def step(self, z: Slots, u: Tensor, decay: Tensor, gates: Gates) -> Slots:
        momentum = gates["mu"] * z[1] + u
        for past in z[2:]:
            momentum = momentum + past
        return (decay * z[0] + momentum, momentum, *(u, *z[2:])[: self.window - 1])

    def system(self, log_decay: Tensor, gates: Gates) -> System:
        return build_system((log_decay, _log(gates["mu"])), self.window)

    def settle(self, z: Slots) -> Slots:
        return (*super().settle(z), *z[2:])


@dataclass(frozen=True)
class Averaged(Learning):
    """The window's gradients, scaled as a whole by a gate c_t ("token"), on top of where the window began.

    P_t = alpha_t P_{t-1},  S_t = alpha_t S_{t-1} - eta_t G_t,  D_t = P_t + c_t S_t; at a window end P = D and S = 0. With
    c_t one over the place in the window, D moves by the mean of the gradients so far.
    Source: TTT (arXiv 2407.04620) Sec. 2.7 and its published code (learnable token rates).
    """

    settles: ClassVar[bool] = True

    @property
    def slots(self) -> int:
        return 3

    @property
    def symbols(self) -> str:
        kept = "P_t = alpha_t P_{t-1}\nS_t = alpha_t S_{t-1} + u_t\nD_t = P_t + token_t S_t"
        return f"{kept}\nP_t = D_t at a window end\nS_t = 0 at a window end"

    @property
    def gates(self) -> tuple[Gate, ...]:
        return (Gate("token", initial=1.0),)

    def start(self, deviation: Tensor) -> Slots:
        return (deviation, deviation, torch.zeros_like(deviation))

    def step(self, z: Slots, u: Tensor, decay: Tensor, gates: Gates) -> Slots:
        begun, total = decay * z[1], decay * z[2] + u
        return (begun + gates["token"] * total, begun, total)

    def system(self, log_decay: Tensor, gates: Gates) -> System:
        sums, c = log_decay.cumsum(-1), gates["token"]
        mask, start = decay_mask(sums), sums.exp()
        mix, scaled = c.unsqueeze(-1) * mask, c * start
        end = start[..., -1]
        return System(
            mix,
            (torch.zeros_like(start), start, scaled),
            (mix[..., -1, :], torch.zeros_like(start), mask[..., -1, :]),
            ((None, end, scaled[..., -1]), (None, end, None), (None, None, end)),
        )

    def settle(self, z: Slots) -> Slots:
        return (z[0], z[0], torch.zeros_like(z[2]))


@dataclass(frozen=True)
class NonParametric(Learning):
    """No fast weights: softmax attention, the Nadaraya-Watson solution, over the last `window` tokens (None: all).

    o_t = sum_i softmax_i(<q_t, k_i> / sqrt(K)) v_i, i in (t - window, t]. Source: Miras Sec. 4, Eq. 10.

    With `persistent` n, every query also sees the keys and values of n learned tokens, whatever the window (Titans,
    arXiv 2501.00663, Sec. 3.3). A memory with fast weights needs none: its learned A_0 is what it has read before.
    """

    window: int | None = None
    persistent: int = 0

    linear: ClassVar[bool] = False
    parametric: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(self.window is None or self.window >= 1, f"NonParametric window={self.window}; must be at least 1")
        require(self.persistent >= 0, f"NonParametric persistent={self.persistent}; must be a number of tokens, or 0")

    @property
    def attended(self) -> int | None:
        return self.window

    @property
    def num_persistent(self) -> int:
        return self.persistent

    @property
    def symbols(self) -> str:
        seen = "i <= t" if self.window is None else f"t - {self.window} < i <= t"
        always = f", and {self.persistent} learned ones" if self.persistent else ""
        return f"o_t = sum_i softmax_i(<q_t, k_i> / sqrt(K)) v_i, {seen}{always}"


def _log(gate: Tensor) -> Tensor:
    return gate.clamp_min(DECAY_EPS).log()


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
