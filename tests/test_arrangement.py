"""Titans' three arrangements against Sec. 4 of the paper written out token by token, in outputs and gradients.

Nothing in the recurrences comes from the package but a layer's parameters.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import miras
from miras import models
from miras.arrangement import ArrangedMixer, forget, make_mixer, segments
from miras.design import Design, MemoryAsContext, MemoryAsGate, Pattern
from miras.engine import recall
from miras.engine.problem import AttentionState
from miras.inputs import Inputs, Normalized
from miras.layer import MemoryLayer
from miras.learning import MultiStep, NonParametric
from miras.memory import MLP
from miras.packing import Packing
from miras.retention import L2, LqRms, ProximalElasticNet, Retention, SignedKL
from tests.problems import assert_close, probe, random_problem, run, sliced

HIDDEN, HEADS, TOKENS = 8, 2, 9
SMALL = {"memory": MLP(expansion=1.5)}


def states(batch: int = 1, tokens: int = TOKENS, seed: int = 1) -> Tensor:
    return torch.randn(batch, tokens, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def built(design: Any, **kwargs: Any) -> Any:
    """A mixer in float64 whose parameters all differ from their initial values."""
    torch.manual_seed(0)
    mixer = make_mixer(design, HIDDEN, HEADS, **kwargs).double()
    with torch.no_grad():
        for p in mixer.parameters():
            p += 0.2 * torch.randn_like(p)
    return mixer


# The paper, token by token. ---------------------------------------------------------------------------------------------


def rms(norm: nn.Module, x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight


def unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def projected(layer: nn.Module, name: str, past: list[Tensor]) -> Tensor:
    """silu(conv(x W)) at the last of the tokens seen, [H, d]."""
    weight, kernel = getattr(layer, f"{name}_proj").weight, getattr(layer, f"{name}_conv1d").weight[:, 0]
    width = min(kernel.shape[1], len(past))
    return F.silu(sum(kernel[:, -1 - s] * (weight @ past[-1 - s]) for s in range(width))).view(HEADS, -1)


class Lmm:
    """Titans Sec. 3.1: a two-layer memory learning 1/2 ||M(k) - v||^2 with momentum and decay, Eq. 8-15."""

    def __init__(self, layer: nn.Module, refresh: int) -> None:
        self.layer, self.refresh, self.past = layer, refresh, []
        self.start = {"up": layer.memory.up, "down": layer.memory.down}
        self.now = self.at = self.start
        self.momentum = {name: torch.zeros_like(w) for name, w in self.start.items()}

    def predict(self, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        y = torch.einsum("hd,hde->he", x, weights["up"])
        y = F.layer_norm(torch.einsum("he,hed->hd", F.gelu(y), weights["down"]), x.shape[-1:], eps=1e-5)
        return x + y * self.layer.memory.norm_weight + self.layer.memory.norm_bias

    def output(self, y: Tensor, x: Tensor) -> Tensor:
        return self.layer.o_proj.weight @ (rms(self.layer.o_norm, y).flatten() * F.silu(self.layer.g_proj.weight @ x))

    def gate(self, module: nn.Module, x: Tensor) -> Tensor:
        return module.proj.weight @ x + module.bias

    def read(self, weights: dict[str, Tensor], past: list[Tensor]) -> Tensor:
        """M*(q) at the last of the tokens seen, with some weights."""
        return self.output(self.predict(weights, unit(projected(self.layer, "q", past))), past[-1])

    def step(self, x: Tensor) -> Tensor:
        """Learn x, then read at it."""
        if len(self.past) % self.refresh == 0:
            self.at = self.now
        self.past = [*self.past, x]
        k, v = (unit(projected(self.layer, name, self.past)) for name in "kv")
        theta = torch.sigmoid(self.gate(self.layer.b_proj, x))  # 2 * initial = 1 is the largest rate
        alpha = torch.sigmoid(self.gate(self.layer.a_proj, x))
        eta = torch.sigmoid(self.gate(self.layer.gate_projs["mu"], x))
        # Copies: in a MAC x itself comes from the weights, but the slope is the one at a given k and v.
        at = {name: w.clone() for name, w in self.at.items()}
        surprise = ((self.predict(at, k) - v) ** 2).sum() / 2
        slopes = torch.autograd.grad(surprise, list(at.values()), create_graph=True)

        def heads(number: Tensor) -> Tensor:
            return number[:, None, None]

        moved = {}
        for (name, start), slope in zip(self.start.items(), slopes, strict=True):
            self.momentum[name] = heads(eta) * self.momentum[name] - heads(theta) * slope
            moved[name] = start + heads(alpha) * (self.now[name] - start) + self.momentum[name]
        self.now = moved
        return self.read(self.now, self.past)


def rotated(x: Tensor, position: int) -> Tensor:
    half = x.shape[-1] // 2
    angles = position * 10000 ** (-torch.arange(half, dtype=torch.float64) / half)
    cos, sin = angles.cos().double(), angles.sin().double()
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def attend(layer: nn.Module, past: list[Tensor], window: int) -> Tensor:
    """Softmax attention from the last of the tokens seen, over the last `window` of them and the persistent ones."""

    def heads(name: str, x: Tensor, position: int) -> Tensor:
        y = (getattr(layer, f"{name}_proj").weight @ x).view(HEADS, -1)
        return y if name == "v" else rotated(y, position)

    entries = [(p, 0) for p in layer.persistent.tokens]
    entries += [(past[i], i) for i in range(max(0, len(past) - window), len(past))]
    q = heads("q", past[-1], len(past) - 1)
    keys, values = (torch.stack([heads(name, x, i) for x, i in entries]) for name in "kv")
    scores = torch.einsum("hd,nhd->nh", q, keys) / math.sqrt(q.shape[-1])
    read = (scores.softmax(0)[..., None] * values).sum(0)
    return layer.o_proj.weight @ read.flatten()


def gated(mixer: ArrangedMixer, y: Tensor, m: Tensor) -> Tensor:
    return rms(mixer.y_norm, y) * F.silu(rms(mixer.m_norm, m))


def memory_as_gate(mixer: Any, x: list[Tensor]) -> list[Tensor]:
    """Sec. 4.2, Eq. 26-28: x~ = [p_1 .. p_N] || x, y = SW-Attn*(x~), o = y (x) M(x~)."""
    lmm = Lmm(mixer.long_term, mixer.design.memory.refresh)
    window = mixer.design.attention.learning.window
    return [gated(mixer, attend(mixer.short_term, x[: t + 1], window), lmm.step(x[t])) for t in range(len(x))]


def memory_as_context(mixer: Any, x: list[Tensor]) -> list[Tensor]:
    """Sec. 4.1, Eq. 21-25: h = M*(S W_Q), y = Attn([p_1 .. p_N] || h || S), M learns y, o = y (x) M*(y)."""
    size = mixer.design.memory.refresh
    lmm, out = Lmm(mixer.long_term, size), []
    for t in range(len(x)):
        if t % size == 0:
            known, context = lmm.now, []
        context = [*context, lmm.read(known, x[: t + 1]), x[t]]
        y = attend(mixer.short_term, context, len(context))
        out.append(gated(mixer, y, lmm.step(y)))
    return out


def memory_as_layer(mixers: Any, x: list[Tensor]) -> list[Tensor]:
    """Sec. 4.3, Eq. 29-31: y = M(x~), o = SW-Attn(y)."""
    lmm = Lmm(mixers[0], mixers[0].design.refresh)
    y = [lmm.step(x_t) for x_t in x]
    return [attend(mixers[1], y[: t + 1], mixers[1].design.learning.window) for t in range(len(y))]


def check(
    mixer: nn.Module, run_mixer: Callable[[Tensor], Tensor], plain: Callable[[Any, list[Tensor]], list[Tensor]]
) -> None:
    """Outputs and the gradients of every parameter and of the inputs."""
    leaves = [states(2).requires_grad_(), *mixer.parameters()]
    ours = run_mixer(leaves[0])
    theirs = torch.stack([torch.stack(plain(mixer, list(row))) for row in leaves[0]])
    assert_close(ours, theirs, "out")
    names = ["x", *(name for name, _ in mixer.named_parameters())]
    pairs = zip(torch.autograd.grad(probe(ours), leaves), torch.autograd.grad(probe(theirs), leaves), strict=True)
    for name, (a, b) in zip(names, pairs, strict=True):
        assert_close(a, b, f"d {name}")
        assert float(b.abs().max()) > 1e-9, name


@pytest.mark.parametrize("refresh", [1, 4])
def test_memory_as_gate(refresh: int) -> None:
    mixer = built(models.titans_mag(window=3, num_persistent=2, refresh=refresh, **SMALL))
    check(mixer, lambda x: mixer(x)[0], memory_as_gate)


@pytest.mark.parametrize("refresh", [1, 4])
def test_memory_as_context(refresh: int) -> None:
    mixer = built(models.titans_mac(num_persistent=2, refresh=refresh, **SMALL))
    check(mixer, lambda x: mixer(x)[0], memory_as_context)


def test_memory_as_layer() -> None:
    pattern = models.titans_mal(window=3, num_persistent=2, refresh=4, **SMALL)
    mixers = nn.ModuleList([built(design) for design in pattern.designs])
    check(mixers, lambda x: mixers[1](mixers[0](x)[0])[0], memory_as_layer)


def test_memory_as_context_on_the_reference_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its inner gradients come from autograd, which must not go into k and v, though these come from the weights."""

    def by_reference(*args: Any, design: Design, **kwargs: Any) -> Any:
        return miras.memorize(*args, design=design, path="reference" if design.parametric else None, **kwargs)

    mixer = built(models.titans_mac(num_persistent=2, refresh=4, **SMALL))
    monkeypatch.setattr("miras.layer.memorize", by_reference)
    check(mixer, lambda x: mixer(x)[0], memory_as_context)


# Their parts. -----------------------------------------------------------------------------------------------------------


def test_a_segment_does_not_see_its_later_tokens() -> None:
    mixer, x = built(models.titans_mac(refresh=4)), states()
    before = mixer(x)[0]
    for t in range(TOKENS):
        changed = x.clone()
        changed[:, t] += 1
        after = mixer(changed)[0]
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.allclose(after[:, t], before[:, t])


def test_persistent_tokens_are_seen_beyond_the_window() -> None:
    layer, x = built(models.transformer(learning=NonParametric(2, persistent=3))), states()
    out, state = layer.mix(x, keep=True)
    assert state.memory.keys.shape[1] == 1
    for t in range(TOKENS):
        (slope,) = torch.autograd.grad(out[:, t].sum(), layer.persistent.tokens, retain_graph=True)
        assert bool((slope.abs().amax(1) > 1e-6).all())
        (reach,) = torch.autograd.grad(probe(layer.mix(x)[0][:, t]), layer.k_proj.weight)
        assert float(reach.abs().max()) > 0
    without = built(models.transformer(2))
    assert "persistent.tokens" not in dict(without.named_parameters())
    with torch.no_grad():
        layer.persistent.tokens += 1
    assert not torch.allclose(layer.mix(x)[0], out)


@pytest.mark.parametrize("conv_size", [0, 3])
def test_persistent_tokens_stand_at_position_0(conv_size: int) -> None:
    """Their keys are those of a sequence of one such token, whatever the layer does to keys."""
    design = models.transformer(learning=NonParametric(persistent=2), inputs=Inputs(Normalized(), conv_size=conv_size))
    layer = built(design)
    for i, token in enumerate(layer.persistent.tokens):
        _, state = layer.mix(token[None, None], keep=True)
        weights = layer._weights()
        assert_close(weights["keys"][:, i], state.memory.keys[0, 0], "keys", 1e-12)
        assert_close(weights["values"][:, i], state.memory.values[0, 0], "values", 1e-12)


@pytest.mark.parametrize("anchor", ["initial", "origin"])
@pytest.mark.parametrize("retention", [L2(), SignedKL(), LqRms(), ProximalElasticNet()], ids=lambda r: r.kind)
@pytest.mark.parametrize("steps", [0, 4, 8, 10])
def test_recall(retention: Retention, anchor: str, steps: int) -> None:
    """What an idle memory gives at the first token after the last window end, from a state inside the next window too."""
    design = models.titans_lmm(memory=MLP(expansion=2.0), retention=retention, refresh=4, anchor=anchor)
    problem = random_problem(design, slow=True, tokens=12)
    end = steps - steps % 4
    still = {**problem, "lr": 0 * problem["lr"], "log_decay": None, "gates": {"mu": 0 * problem["gates"]["mu"]}}
    past = run(sliced(problem, 0, end))[1] if end else None
    expected = run({**sliced(still, end, end + 1), "initial_state": past})[0]
    state = run(sliced(problem, 0, steps))[1] if steps else None
    q, weights = problem["q"][:, end : end + 1], problem["weights"]
    assert_close(recall(q, design=design, weights=weights, state=state), expected, "recalled")
    flat = recall(q.transpose(0, 1), design=design, weights=weights, state=state, cu_seqlens=torch.tensor([0, 1, 2]))
    assert_close(flat, expected.transpose(0, 1), "packed")


def test_segments() -> None:
    """Parts of rows in different phases, of different lengths: every token once, in order, none across a segment's end."""
    lengths, seen, size = torch.tensor([5, 1, 7, 3]), torch.tensor([0, 2, 4, 9, 6]), 4
    rows = torch.tensor([0, 1, 3, 4])
    packing = Packing(F.pad(lengths.cumsum(0), (1, 0)), None, rows, (5, 7))
    x = torch.arange(16.0).view(1, 16, 1)
    taken: dict[int, list[float]] = {int(row): [] for row in rows}
    for part in segments(x, packing, seen, size):
        inner = part.packing(1)
        assert inner is not None and inner.rows is not None
        numbers = part.take(x).flatten().tolist()
        for row, (start, stop) in zip(inner.rows.tolist(), itertools.pairwise(inner.bounds.tolist()), strict=True):
            before = int(seen[row]) + len(taken[row])
            taken[row] += numbers[start:stop]
            after = int(seen[row]) + len(taken[row])
            assert before // size == (after - 1) // size
            assert (row in part.ended.tolist()) == (after % size == 0)
    assert [number for numbers in taken.values() for number in numbers] == list(range(16))
    even = list(segments(torch.zeros(3, 6, 2), None, torch.tensor([1, 5, 9]), 4))
    assert [part.take(torch.zeros(3, 6, 2)).shape for part in even] == [(3, 3, 2), (3, 3, 2)]
    assert all(part.packing(2) is None for part in even)


def test_forget() -> None:
    layer = built(models.transformer(inputs=Inputs(conv_size=3)))
    _, state = layer.mix(states(3, 5), keep=True)
    assert forget(state, torch.tensor([], dtype=torch.int64)) is state
    part = forget(state, torch.tensor([0, 2]))
    assert part.seen.tolist() == [0, 5, 0]
    assert part.memory.keys.shape[1] == 5
    after = layer.mix(states(3, 2, seed=2), part)[0]
    assert_close(after[::2], layer.mix(states(3, 2, seed=2)[::2])[0], "forgotten", 1e-12)
    assert_close(after[1], layer.mix(states(3, 2, seed=2), state)[0][1], "kept", 1e-12)
    none = forget(state, torch.arange(3))
    assert isinstance(none.memory, AttentionState)
    assert none.memory.keys.shape[1] == 0
    assert none.memory.keys.untyped_storage().nbytes() == 0


@pytest.mark.parametrize(
    "design", [models.titans_mac(refresh=4), models.titans_mag(window=3, refresh=4)], ids=lambda d: d.kind
)
def test_state_moves_and_detaches(design: Any) -> None:
    mixer = built(design)
    _, state = mixer.mix(states(2, 6), keep=True)
    assert any(x.requires_grad for x in state.tensors())
    free = state.detach().to("cpu")
    assert not any(x.requires_grad for x in free.tensors())
    assert free.rows == 2
    assert free.nbytes == state.nbytes > 0
    swapped = free.put(torch.tensor([1]), free.index_select(torch.tensor([0])))
    a, b = mixer.mix(states(1, 3, seed=5).expand(2, -1, -1), swapped)[0]
    assert_close(a, b, "rows", 1e-12)
    assert mixer.mix(states(2, 6))[1] is None or isinstance(design, MemoryAsContext)
    with pytest.raises(ValueError, match="holds 2 sequences, the batch has 3"):
        mixer.mix(states(3, 1), state)


@pytest.mark.parametrize(
    "design", [models.titans_mac(refresh=4), models.titans_mag(window=3, refresh=4)], ids=lambda d: d.kind
)
def test_inspect_and_explain(design: Any) -> None:
    mixer, x = built(design), states(2, 6)
    y = mixer.branches(x, None, None, False)[0] if isinstance(design, MemoryAsContext) else x
    seen, expected = mixer.inspect(x), mixer.long_term.inspect(y)
    assert set(seen) == set(expected) > {"lr", "mu", "drift"}
    for name, value in expected.items():
        assert_close(seen[name], value, name, 0.0)
        assert not seen[name].requires_grad
    text = str(mixer.explain())
    assert re.search("memory\n  path: (native|fused|frozen)", text)
    assert "attention\n  path: attention" in text


@pytest.mark.parametrize("design", [models.titans_mac(), models.titans_mag()], ids=lambda d: d.kind)
def test_finite_at_default_initialisation(design: Any) -> None:
    """1,000 random tokens in float32, with gradients at the end."""
    mixer, x = make_mixer(design, 16, 1), torch.randn(1, 1000, 16)
    with torch.no_grad():
        _, state = mixer.mix(x[:, :850], keep=True)
    assert state is not None
    assert all(torch.isfinite(part).all() for part in state.tensors())
    out, _ = mixer.mix(x[:, 850:], state)
    out.square().mean().backward()
    assert float(out.detach().abs().max()) < 100
    for name, p in mixer.named_parameters():
        assert p.grad is not None, f"{name} is dead"
        assert torch.isfinite(p.grad).all(), name


def test_the_report_asks_a_layer_once() -> None:
    from miras.report.inspection import inspect_memory

    config = miras.MirasConfig(models.titans_mag(refresh=4), vocab_size=11, hidden_size=8, num_hidden_layers=2, num_heads=2)
    found = inspect_memory(miras.MirasForCausalLM(config), [1, 2, 3, 4, 5])
    assert [layer.name for layer in found.layers] == ["model.layers.0.attn", "model.layers.1.attn"]
    assert found.notes == []


YAAD, ATTENTION = models.yaad(), models.transformer()
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no design": (lambda: MemoryAsGate("yaad", ATTENTION), TypeError, "memory='yaad'; must be a Design"),  # type: ignore[arg-type]
    "pattern": (lambda: MemoryAsGate(YAAD, Pattern((ATTENTION,))), TypeError, "attention=.*must be a Design"),  # type: ignore[arg-type]
    "no memory": (lambda: MemoryAsGate(ATTENTION, ATTENTION), ValueError, "NonParametric, which keeps no fast weights"),
    "no attention": (lambda: MemoryAsContext(YAAD, YAAD), ValueError, "GradientDescent, which has fast weights; use"),
    "window": (lambda: MemoryAsContext(YAAD, models.transformer(8)), ValueError, "window=8; .*sees the segment"),
    "segment": (
        lambda: MemoryAsContext(replace(YAAD, learning=MultiStep(3)), ATTENTION),
        ValueError,
        "refresh=16, which is no multiple of its 3 gradient steps a token",
    ),
    "mixer": (lambda: make_mixer(Pattern((YAAD,)), 16, 2), TypeError, "Pattern has no mixer; one of Design, Mem"),  # type: ignore[arg-type]
    "layer": (lambda: MemoryLayer(16, 2, models.titans_mag()), TypeError, "must be a miras Design, got MemoryAsGate"),  # type: ignore[arg-type]
    "persistent": (lambda: NonParametric(persistent=-1), ValueError, "persistent=-1; must be a number of tokens"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    make, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        make()


def test_refused_persistent_weights() -> None:
    problem = random_problem(models.transformer(learning=NonParametric(persistent=2)), tokens=5)
    with pytest.raises(ValueError, match=r"weights given: none; 2 persistent tokens need \{'keys': \(2, 2, 4\)"):
        run({**problem, "weights": {}})
    with pytest.raises(ValueError, match=r"weights given: \{'keys': \(2, 1, 4\)"):
        run({**problem, "weights": {"keys": problem["weights"]["keys"][:, :1], "values": problem["weights"]["values"]}})
    with pytest.raises(ValueError, match="takes no weights"):
        run({**random_problem(ATTENTION), "weights": problem["weights"]})


def test_segment_counts_tokens() -> None:
    assert models.titans_mac().segment == 64
    assert MemoryAsContext(replace(YAAD, learning=MultiStep(2)), ATTENTION).segment == 8
    assert isinstance(models.titans_mac().memory, Design)
    assert models.titans_mag().designs == (models.titans_mag(),)
