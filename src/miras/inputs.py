"""How a layer makes a memory's inputs from hidden states: features of q and k, gate maps, and initial scales.

None of it is part of the recurrence, but all of it is part of a model: where rates and decays start decides whether a
deep memory learns (docs/results).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from miras.choice import Choice, require, require_one_of

UNIT_EPS = 1e-6
"""Added to ||x||^2 under the square root when keys and queries are normalised."""


@dataclass(frozen=True)
class GateMap(Choice, abstract=True):
    """A gate as a function of a linear projection x of the hidden state, one number per head or per channel.

    Facts: `projected` is False when the gate does not depend on the hidden state. `per_channel` asks for C numbers a head
    instead of one, `rank` for a low-rank projection (None: full). Its `symbols` are the gate in terms of x and its
    parameters.
    """

    family: ClassVar[str] = "gate map"
    projected: ClassVar[bool] = True

    per_channel: bool = field(default=False, kw_only=True)
    rank: int | None = field(default=None, kw_only=True)

    def parameters(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Learned numbers and their initial values, for a gate of shape [H] or [H, C]."""
        return {}

    def __call__(self, x: Tensor | None, p: Mapping[str, Tensor]) -> Tensor:
        """The gate [..., H] or [..., H, C] from its projection x and its parameters."""
        raise NotImplementedError


@dataclass(frozen=True)
class Constant(GateMap):
    """A fixed number, no parameters."""

    value: float = 1.0

    projected: ClassVar[bool] = False

    @property
    def symbols(self) -> str:
        return f"{self.value:g}"

    def parameters(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        return {}

    def __call__(self, x: Tensor | None, p: Mapping[str, Tensor]) -> Tensor:
        return torch.tensor(self.value)


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

    def __call__(self, x: Tensor | None, p: Mapping[str, Tensor]) -> Tensor:
        assert x is not None
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

    def __call__(self, x: Tensor | None, p: Mapping[str, Tensor]) -> Tensor:
        assert x is not None
        return F.softplus(x + p["bias"])


@dataclass(frozen=True)
class LogDecay(GateMap):
    """log alpha = log sigmoid(x + bias) / temperature, so that alpha is exp(-1 / horizon) at x = 0.

    `horizon` is the number of tokens after which an untouched memory has kept 1/e. Source: GLA (arXiv 2312.06635) Eq. 4.
    """

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

    def __call__(self, x: Tensor | None, p: Mapping[str, Tensor]) -> Tensor:
        assert x is not None
        return F.logsigmoid(x + p["bias"]) / self.temperature


@dataclass(frozen=True)
class MambaDecay(GateMap):
    """log alpha = -exp(A_log) softplus(x + dt_bias), A uniform in [1, 16], dt log-uniform in [0.001, 0.1].

    Source: Mamba2 (arXiv 2405.21060) and Gated DeltaNet (arXiv 2412.06464).
    """

    @property
    def symbols(self) -> str:
        return "-exp(A_log) softplus(x + dt_bias)"

    def parameters(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        rate = torch.empty(shape).uniform_(1, 16)
        dt = torch.empty(shape).uniform_(math.log(0.001), math.log(0.1)).exp().clamp_min(1e-4)
        return {"A_log": rate.log(), "dt_bias": dt + torch.log(-torch.expm1(-dt))}

    def __call__(self, x: Tensor | None, p: Mapping[str, Tensor]) -> Tensor:
        assert x is not None
        return -p["A_log"].exp() * F.softplus(x + p["dt_bias"])


@dataclass(frozen=True)
class Features(Choice, abstract=True):
    """What happens to q, k and v after their projection (and convolution).

    Facts: `decays` says that they make the decay too. Their `symbols` are "q, k, v <- ..." with those three's new values.
    """

    family: ClassVar[str] = "features"
    decays: ClassVar[bool] = False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map q, k, v [B, T, H, D], `positions` [B, T] counting from the start of each sequence."""
        raise NotImplementedError


@dataclass(frozen=True)
class Normalized(Features):
    """q / ||q|| and k / ||k||, and with `values` v / ||v|| too. Source: Miras Sec. 5.3 (q and k).

    Unit values keep the targets of a deep memory at the size of its normalised output (docs/results/parametrisation.md).
    """

    values: bool = False

    @property
    def symbols(self) -> str:
        return "q, k, v <- q / ||q||, k / ||k||, " + ("v / ||v||" if self.values else "v")

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _unit(q), _unit(k), _unit(v) if self.values else v


@dataclass(frozen=True)
class Positive(Features):
    """Feature map of linear attention: 1 + elu(x), scaled by 1 / sqrt(D). Source: Katharopoulos et al. 2020, Eq. 7."""

    @property
    def symbols(self) -> str:
        return "q, k, v <- (1 + elu(q)) / sqrt(K), (1 + elu(k)) / sqrt(K), v"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale = q.shape[-1] ** -0.5
        return scale * (1 + F.elu(q)), scale * (1 + F.elu(k)), v


@dataclass(frozen=True)
class Rotary(Features):
    """Rotary position embedding of q and k, halves rotated against each other. Source: RoFormer (arXiv 2104.09864)."""

    theta: float = 10000.0

    @property
    def symbols(self) -> str:
        turned = "by angles t {theta}^(-2 i / K), pair i of the halves".format(theta=f"{self.theta:g}")
        return f"q, k, v <- turn_t(q), turn_t(k), v; turn_t {turned}"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        half = q.shape[-1] // 2
        require(q.shape[-1] == 2 * half, f"Rotary needs an even head width, got {q.shape[-1]}")
        frequency = self.theta ** (-torch.arange(half, device=q.device, dtype=torch.float32) / half)
        angle = positions[..., None, None].float() * frequency
        cos, sin = angle.cos().to(q.dtype), angle.sin().to(q.dtype)

        def rotate(x: Tensor) -> Tensor:
            a, b = x[..., :half], x[..., half:]
            return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

        return rotate(q), rotate(k), v


@dataclass(frozen=True)
class Inputs(Choice):
    """How a layer makes q, k, v and the gates, and how it draws the initial memory.

    features    map on q, k and v after projection, convolution of width `conv_size` (0: none) and `activation`
    rate        eta_t >= 0; decay: log alpha_t <= 0, None for no forgetting
    gates       maps of the gates that the bias and the learning declare; those left out start at their own initial value
    weight_std  spread of the initial fast weights in units of 1 / sqrt(head_dim) (of initial logits: as it is)
    norm_gain   initial Euclidean norm of the memory's normalised output; its gain and bias are then learned slow
                parameters, the gain starting at norm_gain / sqrt(head_dim). None leaves them out (gain 1)
    aligned     q_proj starts as a copy of k_proj (the first n-th of it with n micro-steps), so that a memory can be read
                where it was written from the first training step on
    output_gate, output_norm  of the layer's read-out
    """

    family: ClassVar[str] = "inputs"

    features: Features = Normalized()
    rate: GateMap = Sigmoid()
    decay: GateMap | None = LogDecay()
    gates: Mapping[str, GateMap] = field(default_factory=dict[str, GateMap])
    conv_size: int = 4
    activation: str | None = "silu"
    weight_std: float = 1.7
    norm_gain: float | None = 1.4
    aligned: bool = False
    output_norm: bool = True
    output_gate: bool = True

    def __post_init__(self) -> None:
        require(self.conv_size >= 0, f"conv_size={self.conv_size}; must be 0 (no convolution) or a width")
        require_one_of("activation", self.activation, ("silu", None))
        require(self.weight_std >= 0, f"weight_std={self.weight_std}; must not be negative")


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + UNIT_EPS)


def _inverse_softplus(y: float) -> float:
    return y + math.log(-math.expm1(-y))
