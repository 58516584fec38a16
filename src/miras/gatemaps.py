"""Gate maps: rates, decays and other gates as functions of a projection of the hidden state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from miras.choice import Choice, require


@dataclass(frozen=True)
class GateMap(Choice, abstract=True):
    """A gate as a function of a linear projection x of the hidden state, one number per head or per channel.

    Facts: `projected` is False when the gate depends on a token's position only, `decays` says that it is never positive, as
    a log-decay must be. `per_channel` asks for C numbers a head instead of one, `rank` for a low-rank projection (None:
    full), `between` for an activation in the middle of it. Its `symbols` are the gate in terms of x and its parameters.
    """

    family: ClassVar[str] = "gate map"
    projected: ClassVar[bool] = True
    decays: ClassVar[bool] = False

    per_channel: bool = field(default=False, kw_only=True)
    rank: int | None = field(default=None, kw_only=True)
    between: str | None = field(default=None, kw_only=True)

    @property
    def restarts(self) -> int | None:
        """Tokens of a window after which the gate begins anew; must be the design's. None: it knows of none."""
        return None

    def parameters(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Learned numbers and their initial values, for a gate of shape [H] or [H, C]."""
        return {}

    def __call__(self, x: Tensor, p: Mapping[str, Tensor]) -> Tensor:
        """The gate [..., H] or [..., H, C] from its projection x (or the positions, if not projected) and its parameters."""
        raise NotImplementedError


@dataclass(frozen=True)
class Constant(GateMap):
    """A fixed number, no parameters."""

    value: float = 1.0

    projected: ClassVar[bool] = False

    @property
    def decays(self) -> bool:  # type: ignore[override]
        return self.value <= 0

    @property
    def symbols(self) -> str:
        return f"{self.value:g}"

    def __call__(self, x: Tensor, p: Mapping[str, Tensor]) -> Tensor:
        return torch.full_like(x, self.value)


@dataclass(frozen=True)
class Sigmoid(GateMap):
    """maximum * sigmoid(x + bias), `initial` at x = 0."""

    initial: float = 0.5
    maximum: float = 1.0

    def __post_init__(self) -> None:
        require(
            0 < self.initial < self.maximum,
            f"Sigmoid initial={self.initial}, maximum={self.maximum}; needs 0 < initial < maximum",
        )

    @property
    def symbols(self) -> str:
        return ("" if self.maximum == 1 else f"{self.maximum:g} ") + "sigmoid(x + bias)"

    def parameters(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        ratio = self.initial / self.maximum
        return {"bias": torch.full(shape, math.log(ratio / (1 - ratio)))}

    def __call__(self, x: Tensor, p: Mapping[str, Tensor]) -> Tensor:
        return self.maximum * torch.sigmoid(x + p["bias"])


@dataclass(frozen=True)
class Softplus(GateMap):
    """softplus(x + bias), `initial` at x = 0."""

    initial: float = 1.0

    def __post_init__(self) -> None:
        require(self.initial > 0, f"Softplus initial={self.initial}; must be positive")

    @property
    def symbols(self) -> str:
        return "softplus(x + bias)"

    def parameters(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        return {"bias": torch.full(shape, _inverse_softplus(self.initial))}

    def __call__(self, x: Tensor, p: Mapping[str, Tensor]) -> Tensor:
        return F.softplus(x + p["bias"])


@dataclass(frozen=True)
class LogDecay(GateMap):
    """log alpha = log sigmoid(x + bias) / temperature, so that alpha is exp(-1 / horizon) at x = 0.

    `horizon` is the number of tokens after which an untouched memory has kept 1/e. Source: GLA (arXiv 2312.06635) Eq. 4.
    """

    decays: ClassVar[bool] = True

    horizon: float = 256.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        require(self.horizon > 0, f"LogDecay horizon={self.horizon}; must be a positive number of tokens")
        require(self.temperature > 0, f"LogDecay temperature={self.temperature}; must be positive")

    @property
    def symbols(self) -> str:
        return "log(sigmoid(x + bias))" + ("" if self.temperature == 1 else f" / {self.temperature:g}")

    def parameters(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        log_alpha = -self.temperature / self.horizon
        return {"bias": torch.full(shape, log_alpha - math.log(-math.expm1(log_alpha)))}

    def __call__(self, x: Tensor, p: Mapping[str, Tensor]) -> Tensor:
        return F.logsigmoid(x + p["bias"]) / self.temperature


@dataclass(frozen=True)
class MambaDecay(GateMap):
    """log alpha = -exp(A_log) softplus(x + dt_bias), A uniform in [1, 16], dt log-uniform in [0.001, 0.1].

    Per channel dt_bias is too, A_log stays one a head.
    Source: Gated DeltaNet (arXiv 2412.06464), after Mamba2; per channel Kimi Linear (arXiv 2510.26692) Sec. 3.
    """

    decays: ClassVar[bool] = True

    @property
    def symbols(self) -> str:
        return "-exp(A_log) softplus(x + dt_bias)"

    def parameters(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        rate = torch.empty(shape[0], *[1] * (len(shape) - 1)).uniform_(1, 16)
        return {"A_log": rate.log(), "dt_bias": initial_time_steps(shape)}

    def __call__(self, x: Tensor, p: Mapping[str, Tensor]) -> Tensor:
        return -p["A_log"].exp() * F.softplus(x + p["dt_bias"])


def initial_time_steps(shape: tuple[int, ...]) -> Tensor:
    """Biases whose softplus is log-uniform in [0.001, 0.1]. Source: Mamba (arXiv 2312.00752) Sec. 3.6."""
    dt = torch.empty(shape).uniform_(math.log(0.001), math.log(0.1)).exp().clamp_min(1e-4)
    return dt + torch.log(-torch.expm1(-dt))


def _inverse_softplus(y: float) -> float:
    return y + math.log(-math.expm1(-y))
