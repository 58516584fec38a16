"""A design: the four choices, when gradients and links are taken, and what is legal; and arrangements of designs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from miras.bias import Bias
from miras.choice import Choice, Gate, require, require_one_of
from miras.inputs import Inputs
from miras.learning import Learning
from miras.memory import Memory
from miras.retention import Retention


@dataclass(frozen=True)
class Design(Choice):
    """One sequence model, up to its sizes.

    memory, bias, retention, learning   the four choices (memory and retention are None for a non-parametric learner)
    refresh      gradient steps that share one gradient point: 1 is the exact online learner, 16 or 64 parallel training
    link_at      "token": W_t = link(A_t) at every token; "refresh": exact at window ends, its tangent in between
    gradient_at  "previous": at W_{t-1}; "decayed": at link(a + alpha_t (A_{t-1} - a)), only with refresh 1
    anchor       "initial": an idle memory relaxes to its learned initial state; "origin": to zero, as printed
    inputs       how a layer makes the memory's inputs and initial state

    Source: Miras Sec. 3 and the contract in docs/equations.md.
    """

    family: ClassVar[str] = "design"

    memory: Memory | None
    bias: Bias
    retention: Retention | None
    learning: Learning
    refresh: int = 16
    link_at: str = "token"
    gradient_at: str = "previous"
    anchor: str = "initial"
    inputs: Inputs = Inputs()

    def __post_init__(self) -> None:
        _require_choice("memory", self.memory, Memory, self.learning)
        _require_choice("bias", self.bias, Bias)
        _require_choice("learning", self.learning, Learning)
        _require_choice("retention", self.retention, Retention, self.learning)
        require(
            isinstance(self.refresh, int) and self.refresh >= 1,
            f"refresh={self.refresh!r}; must be an integer >= 1 (1 is the exact online learner)",
        )
        require_one_of("link_at", self.link_at, ("token", "refresh"))
        require_one_of("gradient_at", self.gradient_at, ("previous", "decayed"))
        require_one_of("anchor", self.anchor, ("initial", "origin"))
        require(
            self.gradient_at == "previous" or self.refresh == 1,
            f"gradient_at='decayed' needs refresh=1, got refresh={self.refresh}: inside a longer window the gradient "
            "point is fixed; use gradient_at='previous' or refresh=1",
        )
        if not self.learning.parametric:
            self._require_attention_inputs()
            return
        assert self.memory is not None
        require(
            self.memory.linear or not self.bias.implicit,
            f"bias {self.bias.kind} takes an implicit step, which has a closed form for a linear memory only; got "
            f"{self.memory.kind}. Use Matrix(), or the bias without its envelope",
        )
        features, read = self.inputs.features, {gate.name for gate in self.gates}
        require(
            set(features.supplies) <= read,
            f"features {features.kind} make the gates {', '.join(features.supplies)}; bias {self.bias.kind} and learning "
            f"{self.learning.kind} read {', '.join(sorted(read)) or 'none'}",
        )
        made, steps = features.makes_steps, self.learning.micro_steps
        require(
            made in (0, steps),
            f"features {features.kind} make {made} steps a token, learning {self.learning} takes {steps}",
        )
        require(
            not features.makes_decay or steps == 1,
            f"features {features.kind} make one decay a key, learning {self.learning} takes one a token",
        )
        maps = (self.inputs.features, self.inputs.rate, self.inputs.decay, *self.inputs.gates.values())
        for item in maps:
            length = None if item is None else item.restarts
            require(
                length is None or length * self.learning.micro_steps == self.refresh,
                f"{item} begins anew every {length} tokens, but a window has {self.refresh} gradient steps: make them equal",
            )
        assert self.retention is not None
        single = [name for name, shape in self.memory.weights(64, 64).items() if shape.d_in == 1]
        require(
            not (self.retention.simplex and single),
            f"retention {self.retention.kind} keeps the inputs of each output unit on a simplex, and {single} of "
            f"{self.memory} have one input: they could not learn. Use SignedKL(), or a memory without them",
        )

    def _require_attention_inputs(self) -> None:
        features, gates = self.inputs.features, self.inputs.gates
        require(
            not (features.needs_rate or features.makes_decay or features.makes_steps),
            f"features {features.kind} make or read the rates or decays of a memory with fast weights; "
            f"learning {self.learning.kind} has none. Plain(), Normalized() or Rotary() fit",
        )
        require(not gates, f"inputs.gates has {', '.join(sorted(gates))}; learning {self.learning.kind} reads no gates")

    @property
    def parametric(self) -> bool:
        """Whether the design has fast weights (False: softmax attention)."""
        return self.learning.parametric

    @property
    def gates(self) -> tuple[Gate, ...]:
        """Gates that the bias and the learning read, besides rate and decay."""
        return (*self.bias.gates, *self.learning.gates)

    @property
    def designs(self) -> tuple[Design, ...]:
        """The pattern of designs over the layers: this one everywhere."""
        return (self,)

    @property
    def parts(self) -> tuple[Design, ...]:
        """The designs that it is made of."""
        return (self,)

    def slow_names(self, value_dim: int) -> tuple[str, ...]:
        """Names of the optional slow parameters of the memory."""
        return tuple(self.memory.slow(value_dim)) if self.memory is not None else ()

    def link(self, dual: Tensor) -> Tensor:
        """W = link(A) of the retention."""
        assert self.retention is not None
        return self.retention.link(dual)


@dataclass(frozen=True)
class Arrangement(Choice, abstract=True):
    """A memory and softmax attention inside one layer: o_t = norm(y_t) o silu(norm(m_t)), y_t from attention, m_t read.

    Both norms have learned gains; what y_t and m_t are made of is the subclass's business.

    Source: Titans (arXiv 2501.00663) Sec. 4; the non-linearity, which the paper leaves open, is SiLU.
    """

    family: ClassVar[str] = "design"

    memory: Design
    attention: Design

    def __post_init__(self) -> None:
        for name, part in (("memory", self.memory), ("attention", self.attention)):
            if not isinstance(part, Design):
                raise TypeError(f"{name}={part!r}; must be a Design")
        require(self.memory.parametric, f"memory has learning {self.memory.learning.kind}, which keeps no fast weights")
        require(
            not self.attention.parametric,
            f"attention has learning {self.attention.learning.kind}, which has fast weights; use miras.models.transformer()",
        )

    @property
    def designs(self) -> tuple[Arrangement, ...]:
        """The pattern over the layers: this arrangement everywhere."""
        return (self,)

    @property
    def parts(self) -> tuple[Design, ...]:
        """The designs that it is made of, the memory's first."""
        return (self.memory, self.attention)


@dataclass(frozen=True)
class MemoryAsGate(Arrangement):
    """Titans MAG: y = attention(x), m = memory(x), side by side. Source: Titans Sec. 4.2, Eq. 26-28."""


@dataclass(frozen=True)
class MemoryAsContext(Arrangement):
    """Titans MAC: attention over a segment of the sequence and over what the memory knows about it, which is then learned.

        r_t = M(W_s; q(x_t))                        the memory at the segment's start s, not written
        y_t = attention(r_{s+1}, x_{s+1}, .., r_t, x_t), read at x_t
        m_t = M(W_t; q(y_t)), W_t having learned y_t

    Segments are the memory's windows, `refresh` gradient steps, so that W_s is where its gradients are taken. r_i and x_i
    are neighbours, 2 (i - s) and 2 (i - s) + 1, in the sequence that the attention sees, and so token t sees no later one.

    Source: Titans Sec. 4.1, Eq. 21-25.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        window, steps = getattr(self.attention.learning, "window", None), self.memory.learning.micro_steps
        require(window is None, f"attention has window={window}; in a MemoryAsContext it sees the segment: leave it None")
        require(
            self.memory.refresh % steps == 0,
            f"memory has refresh={self.memory.refresh}, which is no multiple of its {steps} gradient steps a token: a "
            "segment would end inside a token",
        )
        inputs = self.memory.inputs
        require(
            not (inputs.features.own_read or inputs.features.shares or inputs.token_shift),
            f"memory has features {inputs.features.kind} (or a token shift), whose read-out depends on the token that is "
            "written; what a MemoryAsContext recalls is read before any is",
        )

    @property
    def segment(self) -> int:
        """Tokens a segment."""
        return self.memory.refresh // self.memory.learning.micro_steps


LayerDesign = Design | Arrangement
"""What one layer is made from."""


@dataclass(frozen=True)
class Pattern(Choice):
    """Designs, or arrangements of them, over a model's layers: layer i uses designs[i % len(designs)]."""

    family: ClassVar[str] = "design"

    designs: tuple[LayerDesign, ...]

    def __post_init__(self) -> None:
        require(
            len(self.designs) > 0 and all(isinstance(item, LayerDesign) for item in self.designs),
            "Pattern needs a non-empty tuple of designs",
        )

    @property
    def parts(self) -> tuple[Design, ...]:
        """The designs that it is made of, layer by layer."""
        return tuple(part for item in self.designs for part in item.parts)


def design_from(data: LayerDesign | Pattern | Mapping[str, Any]) -> LayerDesign | Pattern:
    """A design, arrangement or pattern, given as such or as the dictionary that its `to_dict` makes.

    Raises:
        TypeError: anything else.
        ValueError: unknown kinds or fields, or an illegal combination.
    """
    if isinstance(data, (Design, Arrangement, Pattern)):
        return data
    if isinstance(data, Mapping):
        return Design.from_dict({name: item for name, item in data.items() if name != "family"})
    raise TypeError(f"design must be a miras Design, a Pattern, or a dictionary of one; got {type(data).__name__}")


def _require_choice(name: str, value: object, family: type[Choice], learning: Learning | None = None) -> None:
    if learning is not None and isinstance(learning, Learning) and not learning.parametric:
        require(value is None, f"{learning.kind} keeps no fast weights: leave {name}=None, got {value!r}")
        return
    if not isinstance(value, family):
        raise TypeError(
            f"{name}={value!r}; must be an instance of a {family.__name__}, such as miras.{family.family}.X() "
            "(an instance, not the class)"
        )
