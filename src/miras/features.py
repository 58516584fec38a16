"""Feature and gate maps that one paper's model needs: HGRN2, Longhorn, Mamba2, RWKV-7, RetNet, TTT, Atlas.

Each makes a model of four ordinary choices: none of them is known to the engine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from miras.choice import Gate, require, require_one_of
from miras.gatemaps import GateMap, initial_time_steps
from miras.inputs import Features, Norm, Rotary, Stream, unit

RWKV_DECAY = math.exp(-0.5)
"""Largest -log w of RWKV-7: w is at least exp(-exp(-1/2)) = 0.545."""


@dataclass(frozen=True)
class FixedDecay(GateMap):
    """log alpha_h, fixed for each head h = 0 .. H - 1, nothing learned.

    schedule "retnet": log(1 - 2^(-5-h)); "slopes": -scale 2^(-8 (h + 1) / H). Source: RetNet (arXiv 2307.08621) Eq. 8;
    Lightning Attention (arXiv 2401.04658), slopes as in ALiBi (arXiv 2108.12409).
    """

    schedule: str = "retnet"
    scale: float = 1.0

    projected: ClassVar[bool] = False
    decays: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_one_of("FixedDecay schedule", self.schedule, ("retnet", "slopes"))
        require(self.scale > 0, f"FixedDecay scale={self.scale}; must be positive")
        require(not self.per_channel, "FixedDecay is one number a head; leave per_channel=False")

    @property
    def symbols(self) -> str:
        scale = "" if self.scale == 1 else f"{self.scale:g} "
        return f"{scale}log(1 - 2^(-5 - h))" if self.schedule == "retnet" else f"-{scale}2^(-8 (h + 1) / H)"

    def __call__(self, x: Tensor, p: Mapping[str, Tensor]) -> Tensor:
        num_heads = x.shape[-1]
        head = torch.arange(num_heads, device=x.device, dtype=x.dtype)
        if self.schedule == "retnet":
            decay = self.scale * torch.log1p(-torch.exp2(-5 - head))
        else:
            decay = -self.scale * torch.exp2(-8 * (head + 1) / num_heads)
        return decay.expand_as(x)


@dataclass(frozen=True)
class BoundedDecay(GateMap):
    """log w = -exp(-1/2) sigmoid(x + bias): w between 0.545 and 1, its biases spread over the channels.

    Source: RWKV-7 (arXiv 2503.14456) Sec. 4.1; the spread is that of its published code in the middle of the network.
    """

    decays: ClassVar[bool] = True

    @property
    def symbols(self) -> str:
        return "-exp(-1/2) sigmoid(x + bias)"

    def parameters(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        size = math.prod(shape)
        place = torch.arange(size) / max(1, size - 1)
        return {"bias": (6 * place.pow(1.8) - 5.5).view(shape)}

    def __call__(self, x: Tensor, p: Mapping[str, Tensor]) -> Tensor:
        return -RWKV_DECAY * torch.sigmoid(x + p["bias"])


@dataclass(frozen=True)
class TimeStep(GateMap):
    """dt = softplus(x + dt_bias), log-uniform in [0.001, 0.1] at x = 0. Source: Mamba2 (arXiv 2405.21060) Sec. 7.1."""

    @property
    def symbols(self) -> str:
        return "softplus(x + dt_bias)"

    def parameters(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        return {"dt_bias": initial_time_steps(shape)}

    def __call__(self, x: Tensor, p: Mapping[str, Tensor]) -> Tensor:
        return F.softplus(x + p["dt_bias"])


@dataclass(frozen=True)
class WindowRate(GateMap):
    """max(0, 1 / (j + 1) + shift_j) at place j = position mod `length`, the shifts learned, the same for every head.

    For `Averaged`, with `length` the design's refresh. Source: TTT (arXiv 2407.04620), published code (token rates).
    """

    length: int = 16

    projected: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(self.length >= 1, f"WindowRate length={self.length}; must be the design's refresh, at least 1")

    @property
    def restarts(self) -> int:
        return self.length

    @property
    def symbols(self) -> str:
        return f"max(0, 1 / (j + 1) + shift_j), j = t mod {self.length}"

    def parameters(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        return {"shift": torch.zeros(self.length)}

    def __call__(self, x: Tensor, p: Mapping[str, Tensor]) -> Tensor:
        place = x.long() % self.length
        return (1 / (place + 1).to(x.dtype) + p["shift"][place]).clamp_min(0)


@dataclass(frozen=True)
class MiniBatch(Rotary):
    """Rotary positions that start again every `length` tokens, and rates divided by the key width.

    Source: TTT (arXiv 2407.04620) Sec. 2.7 and its published code, `length` being the design's refresh.
    """

    length: int = 16

    needs_rate: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.length >= 1, f"MiniBatch length={self.length}; must be the design's refresh, at least 1")

    @property
    def restarts(self) -> int:
        return self.length

    @property
    def symbols(self) -> str:
        return super().symbols.replace("angles t", f"angles (t mod {self.length})") + "\neta_t <- eta_t / K"

    def __call__(self, s: Stream, p: Mapping[str, Tensor]) -> Stream:
        assert s.lr is not None
        return super().__call__(replace(s, positions=s.positions % self.length, lr=s.lr / s.k.shape[-1]), p)


@dataclass(frozen=True)
class ForgetKeys(Features):
    """Tied gates: f = lower_bound + (1 - lower_bound) sigmoid(k) decays the channels, and 1 - f is the key; q is silu(q).

    Source: HGRN2 (arXiv 2404.07904) Sec. 3.
    """

    lower_bound: float = 0.0

    makes_decay: ClassVar[bool] = True
    per_channel: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(0 <= self.lower_bound < 1, f"ForgetKeys lower_bound={self.lower_bound}; must be in [0, 1)")

    @property
    def symbols(self) -> str:
        b = f"{self.lower_bound:g} + {1 - self.lower_bound:g} " if self.lower_bound > 0 else ""
        return f"q, k, v <- silu(q), 1 - f_t, v\nlog alpha_t <- log(f_t)\nf_t = {b}sigmoid(k)"

    def __call__(self, s: Stream, p: Mapping[str, Tensor]) -> Stream:
        x = s.k.to(torch.promote_types(s.k.dtype, torch.float32))
        rest = 1 - self.lower_bound
        # log f, from whichever form is exact where f is near 1 (written without 1 - f) or near 0 (without log of 0).
        log_decay = F.logsigmoid(x) if self.lower_bound == 0 else torch.log1p(-rest * torch.sigmoid(-x))
        return replace(s, q=F.silu(s.q), k=rest * torch.sigmoid(-s.k), log_decay=log_decay)


@dataclass(frozen=True)
class DiagonalImplicit(Features):
    """Longhorn's own step: the implicit update, its transition I - e k^T k replaced by the diagonal 1 - e k^2.

    e = eta / (1 + eta ||k||^2) becomes the rate, log(1 - e k^2) the decay of each channel; with a `Dot` bias that is the
    whole update. The exact transition is `Envelope(L2())`. Source: Longhorn (arXiv 2407.14207), diagonal approximation.
    """

    makes_decay: ClassVar[bool] = True
    needs_rate: ClassVar[bool] = True
    per_channel: ClassVar[bool] = True

    @property
    def symbols(self) -> str:
        rate, decay = "eta_t <- eta_t / (1 + eta_t ||k||^2)", "log alpha_t <- log(1 - eta_t k^2), with the new eta_t"
        return f"q, k, v <- q, k, v\n{rate}\n{decay}"

    def __call__(self, s: Stream, p: Mapping[str, Tensor]) -> Stream:
        assert s.lr is not None
        k = s.k.to(s.lr.dtype)
        rate = s.lr / (1 + s.lr * k.square().sum(-1))
        return replace(s, lr=rate, log_decay=torch.log1p(-rate.unsqueeze(-1) * k.square()))


@dataclass(frozen=True)
class Discretized(Features):
    """A state-space model's step: the rate is dt, log alpha = -exp(A_log) dt, and D v is added to what is read.

    A is uniform in [1, 16] and D is 1 at the start, one each a head. Source: Mamba2 (arXiv 2405.21060) Sec. 2.1 and 7.1.
    """

    makes_decay: ClassVar[bool] = True
    needs_rate: ClassVar[bool] = True

    @property
    def symbols(self) -> str:
        return "q, k, v <- q, k, v\nlog alpha_t <- -exp(A_log) eta_t\no <- o + D v"

    def parameters(self, num_heads: int, key_dim: int, value_dim: int) -> dict[str, Tensor]:
        return {"A_log": torch.empty(num_heads).uniform_(1, 16).log(), "D": torch.ones(num_heads)}

    def __call__(self, s: Stream, p: Mapping[str, Tensor]) -> Stream:
        assert s.lr is not None
        return replace(s, log_decay=-p["A_log"].to(s.lr.dtype).exp() * s.lr)

    def read(self, out: Tensor, made: Stream, p: Mapping[str, Tensor], norm: Norm) -> Tensor:
        return norm(out + p["D"].to(out.dtype).unsqueeze(-1) * made.v)


@dataclass(frozen=True)
class InContext(Features):
    """RWKV-7's two steps a token: forget at a removal key, at in-context rates, then write at another key.

    kk = k o k_k / ||k o k_k||,  k~ = k o (1 + (a - 1) o k_a),  a the rate, one a channel
    step 1: (kk, 0) at rate a and ridge 1;  step 2: (k~, v) at rate 1 and ridge 0
    so that S_t = (diag(w) - (a o kk)^T kk) S_{t-1} + k~^T v with `RidgeDot` and `MultiStep(2)`. After the first layer v is
    mixed with the first layer's by the gate "residual"; (q . k~ o r_k) v is added to the normalised read-out.
    Source: RWKV-7 (arXiv 2503.14456) Sec. 4.1.
    """

    makes_steps: ClassVar[int] = 2
    needs_rate: ClassVar[bool] = True
    shares: ClassVar[bool] = True
    per_channel: ClassVar[bool] = True
    supplies: ClassVar[tuple[str, ...]] = ("ridge",)

    def gates(self, first: bool) -> tuple[Gate, ...]:
        return () if first else (Gate("residual", initial=0.5, maximum=1.0),)

    @property
    def symbols(self) -> str:
        step = "k, v, eta, ridge <- "
        first = f"{step}k * k_k / ||k * k_k||, 0, eta_t, 1 for the first step"
        second = f"{step}k * (1 + (eta_t - 1) * k_a), v, 1, 0 for the second"
        return f"{first}\n{second}\no <- norm(o) + <q, k * r_k> v, with the second step's k"

    def parameters(self, num_heads: int, key_dim: int, value_dim: int) -> dict[str, Tensor]:
        shape = (num_heads, key_dim)
        return {"k_k": torch.full(shape, 0.71), "k_a": torch.full(shape, 1.02), "r_k": torch.full(shape, -0.04)}

    def __call__(self, s: Stream, p: Mapping[str, Tensor]) -> Stream:
        assert s.lr is not None
        k_k, k_a = p["k_k"].to(s.k.dtype), p["k_a"].to(s.k.dtype)
        rate, v = s.lr, s.v
        if "residual" in s.gates:
            require("values" in s.shared, "a later InContext layer mixes its values with the first one's: give `shared`")
            v = torch.lerp(v, s.shared["values"].to(v.dtype), s.gates["residual"].to(v.dtype))
        else:
            s.shared["values"] = v
        write = s.k * (1 + (rate.to(s.k.dtype) - 1) * k_a)
        one = torch.ones_like(rate[..., 0])
        return replace(
            s,
            k=_alternate(unit(s.k * k_k), write),
            v=_alternate(torch.zeros_like(v), v),
            lr=_alternate(rate, torch.ones_like(rate)),
            gates={"ridge": _alternate(one, torch.zeros_like(one))},
        )

    def read(self, out: Tensor, made: Stream, p: Mapping[str, Tensor], norm: Norm) -> Tensor:
        k, v = made.k[:, 1::2], made.v[:, 1::2]
        return norm(out) + (made.q * k * p["r_k"].to(k.dtype)).sum(-1, keepdim=True) * v


@dataclass(frozen=True)
class Polynomial(Features):
    """Unit keys and queries with their products: [x, c x_i x_j for i <= j], c learned for each head; unit values.

    c starts at 1/2!. The keys of a head of width d then have d + d (d + 1) / 2 numbers.
    Source: Atlas (arXiv 2505.23735) Sec. 3.1, degree 2.
    """

    @property
    def symbols(self) -> str:
        products = "coefficient x_i x_j for i <= j"
        return f"q, k, v <- poly(q / ||q||), poly(k / ||k||), v / ||v||; poly(x) = [x, {products}]"

    def widths(self, key_dim: int, value_dim: int) -> tuple[int, int]:
        return key_dim + key_dim * (key_dim + 1) // 2, value_dim

    def parameters(self, num_heads: int, key_dim: int, value_dim: int) -> dict[str, Tensor]:
        return {"coefficient": torch.full((num_heads,), 0.5)}

    def __call__(self, s: Stream, p: Mapping[str, Tensor]) -> Stream:
        rows, columns = torch.triu_indices(s.q.shape[-1], s.q.shape[-1], device=s.q.device)

        def expand(x: Tensor) -> Tensor:
            x = unit(x)
            return torch.cat((x, p["coefficient"].to(x.dtype).unsqueeze(-1) * x[..., rows] * x[..., columns]), dim=-1)

        return replace(s, q=expand(s.q), k=expand(s.k), v=unit(s.v))


def _alternate(a: Tensor, b: Tensor) -> Tensor:
    """[B, T, ...] twice -> [B, 2 T, ...]: a_1, b_1, a_2, b_2, ..."""
    return torch.stack((a, b), dim=2).flatten(1, 2)
