"""How a layer makes a memory's inputs from hidden states, and hidden states from what it reads.

Features of q and k, initial scales and the output, beside the gate maps; those of one paper only are in `miras.features`.
None of it is part of the recurrence, but all of it is part of a model: where rates and decays start decides whether a deep
memory learns (docs/results).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from miras.choice import Choice, Gate, require, require_one_of
from miras.gatemaps import Constant as Constant
from miras.gatemaps import GateMap, LogDecay, Sigmoid
from miras.gatemaps import MambaDecay as MambaDecay
from miras.gatemaps import Softplus as Softplus

UNIT_EPS = 1e-6
"""Added to ||x||^2 under the square root when keys and queries are normalised."""


@dataclass(frozen=True)
class Stream:
    """What the layer makes of the hidden states for its memory, before or after its features.

    q          [B, T, H, K]; k [B, T n, H, K], v [B, T n, H, V] with n micro-steps a token
    lr         [B, T n, H] or per channel [B, T n, H, K]; log_decay [B, T, H] or [B, T, H, K]; None where there is none
    gates      by name, [B, T n, H]; those that the features use up, of any width
    positions  [B, T] or [1, T], counting from the start of each sequence
    shared     what the first layer of its kind hands to the later ones at the same tokens
    """

    q: Tensor
    k: Tensor
    v: Tensor
    lr: Tensor | None
    log_decay: Tensor | None
    gates: Mapping[str, Tensor]
    positions: Tensor
    shared: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


Norm = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Features(Choice, abstract=True):
    """What lies between a layer's projections and its memory: a map of q, k, v and gates, and of what is read.

    `scaled` divides q by sqrt(K). Facts: `makes_steps` counts the micro-steps of a token that the features make themselves
    (0: none; the layer then projects one key, value and rate for each); `makes_decay` says that they make the decay,
    `per_channel` that they make rates or decays per channel, `needs_rate` that they read the rates; `supplies` names gates
    of the design that they make, `gates` are those they use up, one number a channel of the values; `shares` that the first
    layer of their kind hands something on to the later ones. Their `symbols` are "q, k, v <- ..." with those three's new
    values, then what else they make.
    """

    family: ClassVar[str] = "features"
    makes_steps: ClassVar[int] = 0
    makes_decay: ClassVar[bool] = False
    per_channel: ClassVar[bool] = False
    needs_rate: ClassVar[bool] = False
    shares: ClassVar[bool] = False
    supplies: ClassVar[tuple[str, ...]] = ()

    scaled: bool = field(default=False, kw_only=True)

    @property
    def own_read(self) -> bool:
        """Whether `read` does more than to norm the outputs."""
        return type(self).read is not Features.read

    @property
    def restarts(self) -> int | None:
        """Tokens of a window after which they begin anew; must be the design's. None: they know of none."""
        return None

    def gates(self, first: bool) -> tuple[Gate, ...]:
        """Gates that only the features read; `first` in the first layer of their kind."""
        return ()

    def widths(self, key_dim: int, value_dim: int) -> tuple[int, int]:
        """Widths of the keys and values that the memory meets, for projected heads of these widths."""
        return key_dim, value_dim

    def parameters(self, num_heads: int, key_dim: int, value_dim: int) -> dict[str, Tensor]:
        """Learned numbers and their initial values."""
        return {}

    def __call__(self, s: Stream, p: Mapping[str, Tensor]) -> Stream:
        """The stream that the memory is fed."""
        raise NotImplementedError

    def read(self, out: Tensor, made: Stream, p: Mapping[str, Tensor], norm: Norm) -> Tensor:
        """What becomes of the memory's outputs [B, T, H, V]: normalised by the layer's `norm`, unless more is to be done."""
        return norm(out)


@dataclass(frozen=True)
class Plain(Features):
    """q, k and v as they are."""

    @property
    def symbols(self) -> str:
        return "q, k, v <- q, k, v"

    def __call__(self, s: Stream, p: Mapping[str, Tensor]) -> Stream:
        return s


@dataclass(frozen=True)
class Normalized(Features):
    """q / ||q|| and k / ||k||, and with `values` v / ||v|| too. Source: Miras Sec. 5.3 (q and k).

    Unit values keep the targets of a deep memory at the size of its normalised output (docs/results/parametrisation.md).
    """

    values: bool = False

    @property
    def symbols(self) -> str:
        return "q, k, v <- q / ||q||, k / ||k||, " + ("v / ||v||" if self.values else "v")

    def __call__(self, s: Stream, p: Mapping[str, Tensor]) -> Stream:
        return replace(s, q=unit(s.q), k=unit(s.k), v=unit(s.v) if self.values else s.v)


NORMALIZER_EPS = 1e-6
"""Added to the normaliser of linear attention."""

POSITIVE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {"elu": lambda x: 1 + F.elu(x), "relu": F.relu, "exp": torch.exp}


@dataclass(frozen=True)
class Positive(Features):
    """Feature map of linear attention on q and k, scaled by 1 / sqrt(K): "elu" is 1 + elu(x), "relu", or "exp".

    With `normalizer` the memory also sums the keys, as one more value that is always 1, and its outputs are divided by what
    that reads: o = q S / (q z + 1e-6). Source: Katharopoulos et al. 2020 (arXiv 2006.16236), Eq. 4-7.
    """

    map: str = "elu"
    normalizer: bool = False

    def __post_init__(self) -> None:
        require_one_of("Positive map", self.map, tuple(POSITIVE_MAPS))

    @property
    def own_read(self) -> bool:
        return self.normalizer

    @property
    def symbols(self) -> str:
        f = {"elu": "1 + elu", "relu": "relu", "exp": "exp"}[self.map]
        text = f"q, k, v <- ({f}(q)) / sqrt(K), ({f}(k)) / sqrt(K), " + ("[v, 1]" if self.normalizer else "v")
        return f"{text}\no <- o_v / (o_1 + {NORMALIZER_EPS:g})" if self.normalizer else text

    def widths(self, key_dim: int, value_dim: int) -> tuple[int, int]:
        return key_dim, value_dim + int(self.normalizer)

    def __call__(self, s: Stream, p: Mapping[str, Tensor]) -> Stream:
        feature, scale = POSITIVE_MAPS[self.map], s.q.shape[-1] ** -0.5
        v = F.pad(s.v, (0, 1), value=1.0) if self.normalizer else s.v
        return replace(s, q=scale * feature(s.q), k=scale * feature(s.k), v=v)

    def read(self, out: Tensor, made: Stream, p: Mapping[str, Tensor], norm: Norm) -> Tensor:
        return norm(out[..., :-1] / (out[..., -1:] + NORMALIZER_EPS) if self.normalizer else out)


@dataclass(frozen=True)
class Rotary(Features):
    """Rotary position embedding of q and k, halves rotated against each other. Source: RoFormer (arXiv 2104.09864)."""

    theta: float = 10000.0

    @property
    def symbols(self) -> str:
        turned = f"by angles t {self.theta:g}^(-2 i / K), pair i of the halves"
        return f"q, k, v <- turn_t(q), turn_t(k), v; turn_t {turned}"

    def __call__(self, s: Stream, p: Mapping[str, Tensor]) -> Stream:
        half = s.q.shape[-1] // 2
        require(s.q.shape[-1] == 2 * half, f"Rotary needs an even head width, got {s.q.shape[-1]}")
        dtype = torch.promote_types(s.q.dtype, torch.float32)
        frequency = self.theta ** (-torch.arange(half, device=s.q.device, dtype=dtype) / half)
        angle = s.positions[..., None, None].to(dtype) * frequency
        cos, sin = angle.cos().to(s.q.dtype), angle.sin().to(s.q.dtype)
        steps = s.k.shape[1] // s.q.shape[1]

        def rotate(x: Tensor, times: int) -> Tensor:
            c, n = cos.repeat_interleave(times, 1), sin.repeat_interleave(times, 1)
            a, b = x[..., :half], x[..., half:]
            return torch.cat((a * c - b * n, b * c + a * n), dim=-1)

        return replace(s, q=rotate(s.q, 1), k=rotate(s.k, steps))


@dataclass(frozen=True)
class Output(Choice):
    """How a layer's read-outs become hidden states: normalised, gated by the hidden state, projected.

    norm         "rms", "layer" or None, over the channels of each head, or of all heads in each of `groups` groups (1: all)
    shared       one weight a channel, the same for every head (False: its own for every head, as groups have)
    gate         activation of the gate, a linear projection of the hidden state; None for no gate. `rank`, `between`: of a
                 low-rank projection and the activation in its middle, `gate_bias` a bias at its end
    gate_first   the gate is applied before the norm
    eps          of the norm (None: the layer's)
    """

    family: ClassVar[str] = "output"

    norm: str | None = "rms"
    groups: int | None = None
    shared: bool = True
    gate: str | None = "silu"
    gate_first: bool = False
    rank: int | None = None
    between: str | None = None
    gate_bias: bool = False
    eps: float | None = None

    def __post_init__(self) -> None:
        require_one_of("Output norm", self.norm, ("rms", "layer", None))
        require_one_of("Output gate", self.gate, (*GATE_ACTIVATIONS, None))
        require_one_of("Output between", self.between, (*GATE_ACTIVATIONS, None))
        require(self.groups is None or self.groups >= 1, f"Output groups={self.groups}; must be at least 1, or None")
        require(self.rank is None or self.rank >= 1, f"Output rank={self.rank}; must be at least 1, or None for full rank")
        projected = self.rank is not None or self.between is not None or self.gate_bias
        require(
            self.gate is not None or not projected,
            f"Output gate=None with rank={self.rank}, between={self.between!r}, gate_bias={self.gate_bias}: these belong to "
            "the gate's projection; leave them out, or name the gate's activation",
        )
        require(
            self.between is None or self.rank is not None,
            f"Output between={self.between!r} with rank=None: only a low-rank projection has a middle; give its rank",
        )


GATE_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


@dataclass(frozen=True)
class Inputs(Choice):
    """How a layer makes q, k, v and the gates, how it draws the initial memory, and what it does with what it reads.

    features     map on q, k and v after projection, convolution of width `conv_size` (0: none; `conv_bias` with a bias) and
                 `activation`
    rate         eta_t >= 0; decay: log alpha_t <= 0, None for no forgetting
    gates        maps of the gates that the bias, the learning and the features declare; those left out start at their own
                 initial value
    key_ratio, value_ratio  widths of a head's keys and values, in units of head_dim
    key_heads    heads of q and k, each shared by as many heads of v (None: as many as there are heads)
    token_shift  every projection sees x_t + m (x_{t-1} - x_t), with a learned m of its own
    weight_std   spread of the initial fast weights in units of 1 / sqrt(key width) (of initial logits: as it is)
    norm_gain    initial Euclidean norm of the memory's normalised output; its gain and bias are then learned slow
                 parameters, the gain starting at norm_gain / sqrt(value width). None leaves them out (gain 1)
    aligned      q_proj starts as a copy of k_proj (the first n-th of it with n micro-steps), so that a memory can be read
                 where it was written from the first training step on
    output       the layer's read-out
    """

    family: ClassVar[str] = "inputs"

    features: Features = Normalized()
    rate: GateMap = Sigmoid()
    decay: GateMap | None = LogDecay()
    gates: Mapping[str, GateMap] = field(default_factory=dict[str, GateMap])
    conv_size: int = 4
    conv_bias: bool = False
    activation: str | None = "silu"
    key_ratio: float = 1.0
    value_ratio: float = 1.0
    key_heads: int | None = None
    token_shift: bool = False
    weight_std: float = 1.7
    norm_gain: float | None = 1.4
    aligned: bool = False
    output: Output = Output()

    def __post_init__(self) -> None:
        maps = {"rate": self.rate, "decay": self.decay, **{f"gates[{name!r}]": gate for name, gate in self.gates.items()}}
        families = {"features": (self.features, Features), "output": (self.output, Output)}
        families |= {name: (gate, GateMap) for name, gate in maps.items() if name != "decay" or gate is not None}
        for name, (value, family) in families.items():
            if not isinstance(value, family):
                raise TypeError(f"{name}={value!r}; must be a {family.__name__} (an instance, not the class)")
        require(self.conv_size >= 0, f"conv_size={self.conv_size}; must be 0 (no convolution) or a width")
        require(
            self.decay is None or not self.features.makes_decay,
            f"features {self.features.kind} make the decay themselves: leave decay=None, got {self.decay!r}",
        )
        require(
            self.decay is None or self.decay.decays,
            f"decay={self.decay!r} is no log-decay: it can be positive, and the memory would grow; use LogDecay(), or a map "
            "of your own that declares `decays`",
        )
        require(self.conv_size > 0 or not self.conv_bias, "conv_bias=True needs a convolution; conv_size is 0")
        require_one_of("activation", self.activation, ("silu", None))
        require(self.weight_std >= 0, f"weight_std={self.weight_std}; must not be negative")
        ratios = (self.key_ratio, self.value_ratio)
        require(min(ratios) > 0, f"key_ratio={ratios[0]}, value_ratio={ratios[1]}; must be positive")
        require(self.key_heads is None or self.key_heads >= 1, f"key_heads={self.key_heads}; must be at least 1, or None")

    @property
    def per_channel(self) -> bool:
        """Whether there is one rate or decay a channel, by a gate map or by the features."""
        maps = any(gate is not None and gate.per_channel for gate in (self.rate, self.decay))
        return maps or self.features.per_channel

    def memory_widths(self, head_dim: int) -> tuple[int, int]:
        """Widths of the keys and values that the memory meets, for heads of `head_dim` channels."""
        return self.features.widths(round(self.key_ratio * head_dim), round(self.value_ratio * head_dim))


def unit(x: Tensor) -> Tensor:
    """x / ||x|| over the last axis, with UNIT_EPS."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + UNIT_EPS)
