"""Who is measured: the design on our paths, the bare matrix products of its formula, and other people's code beside it."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miras.bench import products
from miras.bench.case import DECODED, MODES, Case, cut, leaves, memory_inputs
from miras.bench.delta_rule import BLOCK, gated_delta_rule
from miras.bench.ttt_mlp import ttt_mlp
from miras.choice import require_one_of
from miras.design import Design
from miras.engine import PATHS, Plan, memorize, plan
from miras.engine.problem import build_problem
from miras.kernels import fla_ops
from miras.kernels.fused import work_of
from miras.learning import Momentum
from miras.memory import NORM_EPS

Forward = Callable[[], Tensor]
Work = Callable[[], object]

REFERENCE_TOKENS = 512
"""Longest sequence for what takes one token at a time or keeps every token's weights."""


@dataclass(frozen=True)
class Contender:
    """Something to be measured. `name` is what it is asked for by, `about` what it is.

    A contender gives `forward`; `work` makes of it what one repeat of a mode does.
    """

    name: str
    about: str

    def refusal(self, case: Case, mode: str) -> str | None:
        """Why it cannot run a case in a mode; None where it can."""
        return None

    def describe(self, case: Case, mode: str) -> str:
        """What it is, for a case in a mode."""
        return self.about

    def forward(self, case: Case) -> tuple[Forward, list[Tensor]]:
        """A function that computes the outputs, and the tensors that these are differentiated in."""
        raise NotImplementedError

    def decode(self, case: Case) -> Work:
        """A function that writes DECODED tokens, one by one, after the case's tokens."""
        raise NotImplementedError

    def work(self, case: Case, mode: str) -> Work:
        """What one repeat does."""
        require_one_of("mode", mode, MODES)
        torch.manual_seed(0)
        if mode == "decode":
            return torch.no_grad()(self.decode(case))
        forward, tensors = self.forward(case)
        if mode == "forward":
            return torch.no_grad()(forward)
        with torch.no_grad():
            probe = torch.randn_like(forward())
        return lambda: torch.autograd.grad(forward(), tensors, probe, allow_unused=True)

    def flops(self, case: Case, mode: str) -> int | None:
        """FLOPs of one repeat in matrix products, nothing computed twice; None where nobody counted."""
        return None


@dataclass(frozen=True)
class Ours(Contender):
    """`miras.memorize` by a path, or by the one that the design takes by itself (None)."""

    path: str | None = None

    def refusal(self, case: Case, mode: str) -> str | None:
        if self.path == "reference" and case.tokens > REFERENCE_TOKENS:
            return f"one token at a time; give at most {REFERENCE_TOKENS} tokens"
        try:
            self.plan(case, mode)
        except ValueError as error:
            return str(error)
        return None

    def plan(self, case: Case, mode: str) -> Plan:
        """That of one call of `memorize`, on one token in decoding. Raises ValueError where the path refuses."""
        design, widths = case.design, case.design.inputs.memory_widths(case.head_dim)
        steps = design.learning.micro_steps * (1 if mode == "decode" else case.tokens)
        k, v = (torch.empty(case.batch, steps, case.heads, width, device="meta") for width in widths)
        return plan(
            design,
            self.path,
            products.per_channel_gates(design),
            device=torch.device(case.device),
            dtype=case.torch_dtype,
            work=work_of(design, k, v) if design.parametric else 0,
            rows=case.batch * case.heads,
            widths=widths,
        )

    def describe(self, case: Case, mode: str) -> str:
        chosen = self.plan(case, mode)
        blocks = f", blocks of {chosen.tile}" if chosen.tile > 1 else ""
        return f"{self.about} ({chosen.path}{blocks})"

    def forward(self, case: Case) -> tuple[Forward, list[Tensor]]:
        inputs = memory_inputs(case)
        return lambda: memorize(**inputs, path=self.path, check=False)[0], leaves(inputs)

    def decode(self, case: Case) -> Work:
        inputs = memory_inputs(case, context=DECODED)
        options: dict[str, Any] = {"path": self.path, "check": False, "output_final_state": True}
        with torch.no_grad():
            _, start = memorize(**cut(inputs, 0, case.tokens), **options)
            tokens = [cut(inputs, t, t + 1) for t in range(case.tokens, case.tokens + DECODED)]

        def run() -> Tensor:
            state, out = start, None
            for token in tokens:
                out, state = memorize(**token, initial_state=state, **options)
            assert out is not None
            return out

        return run

    def flops(self, case: Case, mode: str) -> int | None:
        known = self.path != "reference" and products.formula(case.design, self.path) is not None
        return products.flops(case, mode, self.path) if known else None


@dataclass(frozen=True)
class Floor(Contender):
    """The products of the design's own path, alone, in `products.operand_type`.

    With a backward pass, the forward ones twice (recomputed).
    """

    def refusal(self, case: Case, mode: str) -> str | None:
        return None if products.formula(case.design) is not None else "the design has no block formula"

    def work(self, case: Case, mode: str) -> Work:
        return torch.no_grad()(products.floor(case, mode))

    def flops(self, case: Case, mode: str) -> int | None:
        return products.floor_flops(case, mode)


@dataclass(frozen=True)
class Attention(Contender):
    """PyTorch's causal softmax attention at the same batch, heads and width."""

    def forward(self, case: Case) -> tuple[Forward, list[Tensor]]:
        q, k, v = (case.random(case.batch, case.heads, case.tokens, case.head_dim) for _ in range(3))
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), [q, k, v]

    def decode(self, case: Case) -> Work:
        sizes = (case.batch, case.heads, case.tokens + DECODED, case.head_dim)
        q, k, v = (case.random(*sizes).detach() for _ in range(3))

        def run() -> Tensor:
            out = q
            for t in range(case.tokens, case.tokens + DECODED):
                out = F.scaled_dot_product_attention(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1])
            return out

        return run

    def flops(self, case: Case, mode: str) -> int | None:
        # Two products of T^2 d / 2 multiplications forward, their four gradients backward.
        pairs = case.tokens * (case.tokens + 1) / 2 if mode != "decode" else DECODED * (case.tokens + (DECODED + 1) / 2)
        once = 4 * case.batch * case.heads * case.head_dim * pairs
        return round(once * (3 if mode == "forward+backward" else 1))


@dataclass(frozen=True)
class TTT(Contender):
    """`ttt_mlp` with a hidden layer of 4 d and the case's refresh as its mini-batch."""

    def refusal(self, case: Case, mode: str) -> str | None:
        if mode == "decode":
            return "its formulation has no step for single tokens"
        return _whole_windows(case)

    def forward(self, case: Case) -> tuple[Forward, list[Tensor]]:
        heads, d, size = case.heads, case.head_dim, case.design.refresh
        q, k, v = (case.random(case.batch, case.tokens, heads, d, scale=d**-0.5) for _ in range(3))
        lr = (0.5 / d * torch.rand(case.batch, case.tokens, heads)).to(q).requires_grad_()
        weights = {
            "up": case.random(heads, d, 4 * d, scale=0.02),
            "up_bias": case.random(heads, 1, 4 * d, scale=0.0),
            "down": case.random(heads, 4 * d, d, scale=0.02),
            "down_bias": case.random(heads, 1, d, scale=0.0),
        }
        token = (1 / torch.arange(1.0, size + 1)).to(q).requires_grad_()
        gain, shift = torch.ones(heads, d).to(q).requires_grad_(), case.random(heads, d, scale=0.0)
        return lambda: ttt_mlp(q, k, v, lr, token, weights, gain, shift), [
            q,
            k,
            v,
            lr,
            token,
            *weights.values(),
            gain,
            shift,
        ]


class _Residual(nn.Module):
    """x + LN(gelu(x up) down), a memory for titans-pytorch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(width, 4 * width) * width**-0.5)
        self.down = nn.Parameter(torch.randn(4 * width, width) * (4 * width) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.layer_norm(F.gelu(x @ self.up) @ self.down, x.shape[-1:], eps=NORM_EPS)


@dataclass(frozen=True)
class Titans(Contender):
    """titans-pytorch's NeuralMemory without its projections of q, k and v; batch_size the refresh, momentum as the design.

    chunk_size is the refresh too, its fast setting, in which a chunk shares one rate, momentum factor and decay. `by_token`
    sets it to 1, so that every token has its own and it is the recurrence that the design is; it then keeps every token's
    weights and its time grows with the square of the length.
    """

    by_token: bool = False

    def refusal(self, case: Case, mode: str) -> str | None:
        if importlib.util.find_spec("titans_pytorch") is None:
            return "not installed: pip install titans-pytorch"
        if mode == "decode":
            return "not adapted: its cache stores a batch at a time"
        if self.by_token and case.tokens > REFERENCE_TOKENS:
            return f"keeps every token's weights; give at most {REFERENCE_TOKENS} tokens"
        return _whole_windows(case)

    def forward(self, case: Case) -> tuple[Forward, list[Tensor]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            from titans_pytorch.neural_memory import NeuralMemory
        width = case.heads * case.head_dim
        layer: Any = NeuralMemory(
            width,
            chunk_size=1 if self.by_token else case.design.refresh,
            batch_size=case.design.refresh,
            dim_head=case.head_dim,
            heads=case.heads,
            model=_Residual(case.head_dim),
            momentum=isinstance(case.design.learning, Momentum),
            mem_model_norm_add_residual=False,
            pre_rmsnorm=False,
            store_memory_loss_fn=lambda y, v: (y - v).square().sum(-1) / 2,
            adaptive_step_transform=torch.sigmoid,
        )
        layer.to_queries, layer.to_keys, layer.to_values = nn.Identity(), nn.Identity(), nn.Identity()
        layer.combine_heads = nn.Identity()
        with torch.no_grad():
            layer.to_decay_factor[0].bias -= 8
            layer.to_adaptive_step[0].bias -= 4
        layer = layer.to(case.device, case.torch_dtype)
        x = case.random(case.batch, case.tokens, width, scale=case.head_dim**-0.5)
        return lambda: layer(x)[0], [x, *layer.parameters()]


@dataclass(frozen=True)
class DeltaRule(Contender):
    """`gated_delta_rule` on the tensors that our path is given."""

    def refusal(self, case: Case, mode: str) -> str | None:
        if mode == "decode":
            return "its formulation has no step for single tokens"
        if not _is_gated_delta_rule(case.design):
            return "it computes the gated delta rule (gated_deltanet) only"
        return None if case.tokens % BLOCK == 0 else f"tokens={case.tokens} is no multiple of its blocks of {BLOCK}"

    def forward(self, case: Case) -> tuple[Forward, list[Tensor]]:
        inputs = memory_inputs(case)
        tensors = [*(inputs[name] for name in ("q", "k", "v", "lr", "log_decay")), inputs["weights"]["W"]]
        wide, narrow = tensors[-1].dtype, tensors[2].dtype
        return lambda: gated_delta_rule(*(x.to(wide) for x in tensors)).to(narrow), tensors


@dataclass(frozen=True)
class Fla(Contender):
    """The op that path "fla" calls, alone, from a memory of zeros.

    Its inputs are made beforehand, decays and rates in float32 and the rest in the case's type.
    """

    def refusal(self, case: Case, mode: str) -> str | None:
        if mode == "decode":
            return "not adapted: its op takes whole sequences; --path fla decodes"
        return Ours("fla", "", "fla").refusal(case, mode)

    def forward(self, case: Case) -> tuple[Forward, list[Tensor]]:
        inputs, n = memory_inputs(case), case.design.learning.micro_steps
        with torch.no_grad():
            op, given = fla_ops.op_of(build_problem(**inputs), case.torch_dtype, decays=inputs["log_decay"] is not None)
        tensors = [x.requires_grad_() for x in given.values()]
        return lambda: op(**given, scale=1.0)[0][:, n - 1 :: n], tensors


def _is_gated_delta_rule(design: Design) -> bool:
    return (
        design.parametric
        and fla_ops.unfit(design) is None
        and (design.learning.kind, design.bias.kind) == ("GradientDescent", "L2")
        and (design.gradient_at, design.anchor) == ("decayed", "origin")
        and design.inputs.decay is not None
        and not products.per_channel_gates(design)
    )


def _whole_windows(case: Case) -> str | None:
    size = case.design.refresh
    return None if case.tokens % size == 0 else f"tokens={case.tokens} is no multiple of refresh={size}"


OURS = Ours("miras", "our default path")

PEERS: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        Floor("floor", "the matrix products of our path, alone"),
        TTT("ttt-mlp", "TTT-MLP as published, hidden width 4 d"),
        Titans("titans-pytorch", "NeuralMemory, chunk_size = batch_size = refresh"),
        Titans("titans-by-token", "NeuralMemory, chunk_size 1, batch_size = refresh", by_token=True),
        Attention("sdpa", "causal softmax attention of PyTorch"),
        DeltaRule("delta-rule", f"the gated delta rule by triangular solves, blocks of {BLOCK}"),
        Fla("fla-op", "flash-linear-attention's op for the design, alone"),
    )
}
"""What a design can be measured beside, by name."""


def contenders(peers: list[str], paths: list[str]) -> list[Contender]:
    """Our default path, further paths, and peers, by name. Raises ValueError for unknown names."""
    for name in paths:
        require_one_of("path", name, PATHS)
    for name in peers:
        require_one_of("peer", name, tuple(PEERS))
    return [OURS, *(Ours(name, "our path", name) for name in paths), *(PEERS[name] for name in peers)]
