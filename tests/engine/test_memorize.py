"""The public op: what it refuses and how it says so, dtypes, states as objects, graphs, and `explain`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import miras
from miras import bias, learning, memory, models, retention
from miras.design import Design
from miras.engine import AttentionState, MemoryState
from miras.kernels import fused, native
from tests.problems import Problem, assert_close, differentiable, random_problem, run, sliced

YAAD = Design(memory.MLP(2, 2.0), bias.Huber("norm"), retention.L2(), learning.GradientDescent(), refresh=4)
TITANS = replace(YAAD, bias=bias.L2(), learning=learning.Momentum())
DELTA = Design(memory.Matrix(), bias.L2(), retention.L2(), learning.MultiStep(2), refresh=1)
THREE = replace(YAAD, memory=memory.MLP(3, 1.0), bias=bias.L2())
ATTENTION = models.transformer(window=3)

B, T, H, D = 2, 5, 2, 4


def changed(design: Design, **changes: Callable[[Any], Any]) -> Problem:
    problem = random_problem(design, batch=B, tokens=T, heads=H, width=D)
    for name, change in changes.items():
        problem[name] = change(problem.get(name))
    return problem


def put(value: float) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        x = x.clone()
        x.view(-1)[3] = value
        return x

    return change


def group(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {**tensors, name: change(tensors[name])}


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {key: x for key, x in tensors.items() if key != name}


def extra(name: str, *shape: int) -> Callable[[Any], dict[str, Tensor]]:
    return lambda tensors: {**(tensors or {}), name: torch.rand(*shape, dtype=torch.float64)}


REFUSED: dict[str, tuple[Design, dict[str, Any], type[Exception], str]] = {
    # q, k, v
    "q of three axes": (YAAD, {"q": lambda q: q[0]}, ValueError, r"q has shape \(5, 2, 4\); must be \[batch, time"),
    "no tensor": (YAAD, {"v": lambda v: v.tolist()}, TypeError, "v must be a tensor, got list"),
    "integer q": (YAAD, {"q": lambda q: q.long()}, TypeError, "q has dtype torch.int64; allowed: float64, float32"),
    "mixed dtypes": (YAAD, {"k": lambda k: k.float()}, TypeError, "dtypes torch.float64, torch.float32.*the same"),
    "short k": (YAAD, {"k": lambda k: k[:, :-1]}, ValueError, r"k has shape \(2, 4, 2, 4\).*must be \(2, 5, 2, 4\)"),
    "narrow k": (YAAD, {"k": lambda k: k[..., :-1]}, ValueError, r"k has shape \(2, 5, 2, 3\).*must be"),
    "heads of v": (YAAD, {"v": lambda v: v[:, :, :1]}, ValueError, r"v has shape \(2, 5, 1, 4\).*must be"),
    "micro-steps": (DELTA, {"k": lambda k: k[:, :T]}, ValueError, "2 gradient steps a token"),
    "wide v": (YAAD, {"v": lambda v: torch.cat((v, v), -1)}, ValueError, "key width 4 must equal value width 8"),
    "empty sequence": (
        YAAD,
        {name: lambda x: x[:, :0] for name in ("q", "k", "v", "lr", "log_decay")},
        ValueError,
        "sequence is empty; give at least one token",
    ),
    "empty batch": (
        YAAD,
        {name: lambda x: x[:0] for name in ("q", "k", "v", "lr", "log_decay")},
        ValueError,
        "batch is empty; give at least one row",
    ),
    **{
        f"{what} in {name}": (YAAD, {name: put(value)}, ValueError, rf"{name} holds NaN or infinite.*1 of")
        for name in ("q", "k", "v", "lr", "log_decay")
        for what, value in (("NaN", float("nan")), ("infinity", float("inf")))
    },
    "NaN in a weight": (YAAD, {"weights": group("up", put(float("nan")))}, ValueError, "up holds NaN"),
    "NaN in a gate": (YAAD, {"gates": group("delta", put(float("nan")))}, ValueError, "delta holds NaN"),
    # rates and decays
    "no rate": (YAAD, {"lr": lambda x: None}, ValueError, "lr is missing: give the rates"),
    "negative rate": (YAAD, {"lr": put(-0.5)}, ValueError, r"lr holds negative rates \(smallest -0.5\)"),
    "positive log-decay": (YAAD, {"log_decay": put(0.25)}, ValueError, r"positive numbers \(largest 0.25\).*<= 0"),
    "integer rate": (YAAD, {"lr": lambda x: x.long()}, TypeError, "lr must be a floating-point tensor"),
    "rate as a number": (YAAD, {"lr": lambda x: 0.1}, TypeError, "lr must be a floating-point tensor, got float"),
    "long rate": (YAAD, {"lr": lambda x: torch.cat((x, x), 1)}, ValueError, r"lr has shape .*must be \(2, 5, 2\)"),
    "channels of the rate": (
        YAAD,
        {"lr": lambda x: x.unsqueeze(-1).expand(-1, -1, -1, 3)},
        ValueError,
        r"must be \(2, 5, 2\) \[B, T, H\] or \(2, 5, 2, 4\)",
    ),
    "channels of a hidden layer": (
        THREE,
        {"lr": lambda x: x.unsqueeze(-1).expand(-1, -1, -1, 4)},
        ValueError,
        r"hidden1.*no model-width axis; give one number a head",
    ),
    "channels of two widths": (
        replace(YAAD, memory=memory.GatedMLP(), bias=bias.L2()),
        {
            "lr": lambda x: x.unsqueeze(-1).expand(-1, -1, -1, 4),
            "v": lambda v: v[..., :3],
            "weights": lambda w: {"gate": w["gate"][..., :6], "up": w["up"][..., :6], "down": w["down"][:, :6, :3]},
        },
        ValueError,
        "model-width axes.*'down': 3",
    ),
    "decay of every micro-step": (
        DELTA,
        {"log_decay": lambda x: torch.cat((x, x), 1)},
        ValueError,
        r"log_decay has shape \(2, 10, 2\); must be \(2, 5, 2\)",
    ),
    # gates and weights
    "missing gate": (YAAD, {"gates": without("delta")}, ValueError, r"gates given: none; this design reads \['delta'\]"),
    "unknown gate": (TITANS, {"gates": extra("delta", B, T, H)}, ValueError, r"gates given: \['delta', 'mu'\].*\['mu'\]"),
    "negative delta": (YAAD, {"gates": group("delta", put(-1.0))}, ValueError, r"'delta' lies in \[-1, .*allowed: \[0, inf"),
    "mu above one": (TITANS, {"gates": group("mu", put(1.5))}, ValueError, r"'mu' lies in .*1.5\]; allowed: \[0, 1\]"),
    "shape of a gate": (YAAD, {"gates": group("delta", lambda x: x[:, :2])}, ValueError, r"delta has shape \(2, 2, 2\)"),
    "integer gate": (YAAD, {"gates": group("delta", lambda x: x.long())}, TypeError, "delta must be a floating-point"),
    "missing weight": (YAAD, {"weights": without("down")}, ValueError, r"weights given: \['up'\]; MLP needs .*'down': \(2"),
    "no weights": (YAAD, {"weights": lambda x: None}, ValueError, "weights given: none; MLP needs"),
    "unknown weight": (YAAD, {"weights": extra("W", 2, 2)}, ValueError, r"weights given: .*'W'.*may have.*norm.weight"),
    "shape of a weight": (
        YAAD,
        {"weights": group("up", lambda w: w.mT)},
        ValueError,
        r"weight 'up' has shape \(2, 8, 4\); must be \(2, 4, 8\)",
    ),
    "heads of a weight": (YAAD, {"weights": group("up", lambda w: w[:1])}, ValueError, "weight 'up' has shape"),
    "slow of every row": (YAAD, {"weights": extra("norm.bias", B, H, D)}, ValueError, r"'norm.bias'.*must be \(2, 4\)"),
    "rate of attention": (ATTENTION, {"lr": lambda x: torch.rand(B, T, H)}, ValueError, "non-parametric.*takes no lr"),
    "gates of attention": (ATTENTION, {"gates": extra("mu", B, T, H)}, ValueError, "non-parametric.*takes no gates"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    design, changes, error, message = REFUSED[name]
    problem = changed(design, **changes)
    with pytest.raises(error, match=message):
        run(problem)


def test_numbers_with_an_infinite_sum_are_numbers() -> None:
    out, _ = run(changed(YAAD, v=lambda v: torch.full_like(v, 1e308)))
    assert out.isfinite().all()


@pytest.mark.parametrize(
    ("bounds", "batch", "message"),
    [
        (torch.tensor([0, 5]), 2, "batch must be 1, got 2"),
        (torch.tensor([0, 2, 4]), 1, r"cu_seqlens=\[0, 2, 4\]; must start at 0, rise strictly .* end at T=5"),
        (torch.tensor([1, 5]), 1, "must start at 0"),
        (torch.tensor([0, 3, 3, 5]), 1, "no empty sequence"),
        (torch.tensor([0, 4, 3, 5]), 1, "rise strictly"),
        (torch.tensor([0, 7]), 1, "end at T=5"),
        (torch.tensor([0.0, 5.0]), 1, "one-dimensional integer tensor"),
        (torch.tensor([[0, 5]]), 1, "one-dimensional integer tensor"),
        (torch.tensor([5]), 1, "one-dimensional integer tensor"),
    ],
)
def test_refused_cu_seqlens(bounds: Tensor, batch: int, message: str) -> None:
    for design in (YAAD, ATTENTION):
        with pytest.raises(ValueError, match=message):
            run(random_problem(design, batch=batch, tokens=5), cu_seqlens=bounds)


def test_refused_states() -> None:
    problem = random_problem(YAAD, batch=2)
    _, state = run(random_problem(YAAD, batch=3))
    with pytest.raises(ValueError, match="initial_state has 3 rows; this call has 2 sequences"):
        run(problem, initial_state=state)
    one = random_problem(YAAD, batch=1, tokens=5)
    with pytest.raises(ValueError, match="initial_state has 3 rows; this call has 2 sequences"):
        run(one, initial_state=state, cu_seqlens=torch.tensor([0, 2, 5]))


@pytest.mark.parametrize(
    ("design", "other", "message"),
    [
        (YAAD, TITANS, r"holds \{'up': \(2, 2, 4, 8\), .* a row; this call needs \{'up': \(2, 1, 4, 8\)"),
        (YAAD, DELTA, r"holds \{'W': .*needs \{'up'"),
        (YAAD, ATTENTION, "is a AttentionState; this design goes on from the MemoryState"),
        (ATTENTION, YAAD, "is a MemoryState; this design goes on from the AttentionState"),
    ],
)
def test_refused_states_of_other_designs(design: Design, other: Design, message: str) -> None:
    _, state = run(random_problem(other))
    with pytest.raises((ValueError, TypeError), match=message):
        run(random_problem(design), initial_state=state)


@pytest.mark.parametrize("design", [YAAD, ATTENTION], ids=["memory", "attention"])
@pytest.mark.parametrize("sizes", [{"heads": 3}, {"width": 6}])
def test_refused_states_of_other_sizes(design: Design, sizes: dict[str, int]) -> None:
    _, state = run(random_problem(design, **sizes))
    with pytest.raises(ValueError, match=r"initial_state holds .* a row; this call needs"):
        run(random_problem(design), initial_state=state)


def test_refused_paths() -> None:
    problem = random_problem(YAAD)
    with pytest.raises(ValueError, match=r"path='fast'; allowed: attention, fla, triton, .*, or None to choose"):
        run(problem, path="fast")
    refusals = {
        "attention": "the design has fast weights",
        "triangular": "refresh=4: gradients stand still over a window",
        "substituted": "refresh=4",
        "recurrent": "refresh=1 only",
    }
    for path, reason in refusals.items():
        with pytest.raises(
            ValueError, match=rf"path='{path}' refuses this design: .*{reason}.*able: native, fused, frozen, reference"
        ):
            run(problem, path=path)
    with pytest.raises(ValueError, match="no fast weights; able: attention"):
        run(random_problem(ATTENTION), path="reference")


@dataclass(frozen=True)
class StepByStep(learning.GradientDescent):
    """A user's rule that gives its step only."""

    linear: ClassVar[bool] = False


@dataclass(frozen=True)
class Listed(bias.L2):
    """A user's bias with a field that has no hash, by which no compiled graph can be kept."""

    scales: Any = (1.0,)


EXPLAINED = {
    "native": (YAAD, {"attention", "triangular", "substituted", "recurrent"}),
    "triangular": (replace(DELTA, bias=Listed([1.0])), {"attention", "native", "fused", "frozen"}),
    "substituted": (replace(YAAD, refresh=1, bias=Listed([1.0])), {"attention", "native", "triangular", "fused", "frozen"}),
    "frozen": (
        replace(YAAD, memory=memory.Matrix(), bias=Listed([1.0])),
        {"attention", "native", "triangular", "substituted", "fused", "recurrent"},
    ),
    "recurrent": (
        replace(YAAD, refresh=1, retention=retention.KL(), bias=Listed([1.0])),
        {"attention", "native", "triangular", "substituted", "fused", "frozen"},
    ),
    "reference": (
        replace(YAAD, learning=StepByStep()),
        {"attention", "native", "triangular", "substituted", "fused", "frozen", "recurrent"},
    ),
    "attention": (ATTENTION, {"native", "triangular", "substituted", "fused", "frozen", "recurrent", "reference"}),
}


@pytest.mark.parametrize("path", EXPLAINED)
def test_explain(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "has_compiler", lambda: True)
    monkeypatch.setattr(native, "compiler", lambda: ("g++",))
    design, refused = EXPLAINED[path]
    found = miras.explain(design, device="cpu", dtype=torch.bfloat16)
    assert found.path == path
    # Those need a GPU: tests/kernels/test_fla_ops.py, test_triton.py.
    assert set(found.refusals) == {"fla", "triton", *refused}
    text = str(found)
    assert text.startswith(f"path: {path}")
    assert all(f"not {name}: {reason}" in text for name, reason in found.refusals.items())
    problem = random_problem(design)
    assert_close(run(problem)[0], run(problem, path=path)[0])
    with pytest.raises(TypeError, match="must be a floating-point type"):
        miras.explain(design, dtype=torch.int64)


HALF = [YAAD, TITANS, DELTA, replace(YAAD, retention=retention.SignedKL(), link_at="refresh")]


@pytest.mark.parametrize("design", HALF, ids=lambda d: type(d.learning).__name__ + type(d.retention).__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(design: Design, dtype: torch.dtype) -> None:
    """Inputs are raised before anything is computed: only the output is rounded, and the state stays float32."""
    problem = random_problem(design, dtype=torch.float32)
    halves = {name: problem[name].to(dtype) for name in ("q", "k", "v")}
    out, state = run({**problem, **halves})
    raised, expected = run({**problem, **{name: x.float() for name, x in halves.items()}})
    assert out.dtype == dtype
    assert torch.equal(out, raised.to(dtype))
    assert {x.dtype for x in state.tensors()} == {torch.float32, torch.int64}
    for name, x in expected.slots.items():
        assert torch.equal(state.slots[name], x)
    if design is DELTA:  # linear, so that rounded inputs give nearby outputs
        assert_close(out.float(), run(problem)[0], tolerance=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_attention(dtype: torch.dtype) -> None:
    problem = random_problem(ATTENTION, dtype=torch.float32)
    out, _ = run({name: x.to(dtype) if isinstance(x, Tensor) else x for name, x in problem.items()})
    assert out.dtype == dtype
    assert_close(out.float(), run(problem)[0], tolerance=0.02)


def test_autocast_is_left_outside() -> None:
    problem = random_problem(YAAD, dtype=torch.float32)
    expected, _ = run(problem)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(problem)[0], expected)


def test_float32_is_close_to_float64() -> None:
    problem = random_problem(TITANS, tokens=40)
    single = {
        name: {key: y.float() for key, y in x.items()} if isinstance(x, dict) else x.float() if isinstance(x, Tensor) else x
        for name, x in problem.items()
    }
    out, _ = run(single)
    assert out.dtype == torch.float32
    assert_close(out, run(problem)[0], tolerance=1e-4)


def test_final_state_only_on_request() -> None:
    for design in (YAAD, ATTENTION):
        problem = random_problem(design)
        assert miras.memorize(**problem)[1] is None
        assert miras.memorize(**problem, output_final_state=True)[1] is not None


def test_check_can_be_left_out() -> None:
    problem = changed(YAAD, lr=put(-0.5))
    out, _ = miras.memorize(**problem, check=False)
    assert torch.isfinite(out).all()


def test_inputs_are_left_alone() -> None:
    problem = random_problem(TITANS)
    before = {name: x.clone() for name, x in problem.items() if isinstance(x, Tensor)}
    _, state = run(problem)
    copies = [x.clone() for x in state.tensors()]
    run(problem, initial_state=state)
    assert all(torch.equal(problem[name], x) for name, x in before.items())
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), copies, strict=True))


GRAPHS = [YAAD, TITANS, DELTA, replace(YAAD, refresh=1), replace(YAAD, learning=learning.Omega(2)), ATTENTION]


@pytest.mark.parametrize("design", GRAPHS, ids=lambda d: type(d.learning).__name__ + str(d.refresh))
def test_no_grad_and_inference_mode(design: Design) -> None:
    """Same numbers, no graph; a state made in inference mode can be gone on from, on either side."""
    problem, found = differentiable(random_problem(design, tokens=7))
    expected, _ = run(problem)
    assert expected.requires_grad
    with torch.no_grad():
        out, state = run(problem)
        assert torch.equal(out, expected)
        assert not out.requires_grad
        assert not design.parametric or not any(x.requires_grad for x in state.tensors())
        assert torch.is_inference_mode_enabled() is False
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        inside = random_problem(design, tokens=7)
        first, state = run(sliced(inside, 0, 3))
        state = state.index_select(torch.tensor([0, 1]))
        second, after = run(sliced(inside, 3, 7), initial_state=state)
        assert_close(torch.cat((first, second), 1), expected)
        assert torch.is_inference_mode_enabled()
    if design.parametric:
        again, _ = run(sliced(problem, 3, 7), initial_state=state)
        assert_close(again, expected[:, 3:])
        assert again.requires_grad
        again.sum().backward()
        assert found["q"].grad is not None
    assert after.rows == 2


@pytest.mark.parametrize("design", GRAPHS, ids=lambda d: type(d.learning).__name__ + str(d.refresh))
def test_no_graph_where_nothing_is_learned(design: Design) -> None:
    out, state = run(random_problem(design))
    assert not any(x.requires_grad for x in (out, *state.tensors()))


@pytest.mark.parametrize("leaf", ["q", "lr", "log_decay", "weights", "state"])
def test_any_single_leaf_makes_a_graph(leaf: str) -> None:
    problem = random_problem(TITANS)
    state = None
    if leaf == "state":
        state = run(problem)[1].map(lambda x: x.requires_grad_() if x.is_floating_point() else x)
    elif leaf == "weights":
        problem["weights"]["down"].requires_grad_()
    else:
        problem[leaf].requires_grad_()
    for path in (None, "reference"):
        out, _ = run(problem, initial_state=state, path=path)
        assert out.requires_grad


def test_memory_state() -> None:
    _, state = run(random_problem(TITANS, batch=3, tokens=6))
    assert isinstance(state, MemoryState)
    assert state.rows == 3
    assert state.phase.tolist() == [2, 2, 2]
    assert state.phase.dtype == torch.int64
    assert state.slots["up"].shape == (3, 2, 2, 4, 8)
    assert state.point["down"].shape == (3, 2, 8, 4)
    assert state.nbytes == sum(x.numel() * x.element_size() for x in state.tensors())
    picked = state.index_select(torch.tensor([2, 0, 0, 1]))
    assert picked.rows == 4
    assert torch.equal(picked.slots["up"][1], state.slots["up"][0])
    assert torch.equal(picked.point["up"][3], state.point["up"][1])
    assert picked.phase.tolist() == [2, 2, 2, 2]
    tracked = state.map(lambda x: x * 2)
    assert torch.equal(tracked.slots["up"], 2 * state.slots["up"])
    leaf = state.map(lambda x: x.clone().requires_grad_() if x.is_floating_point() else x)
    assert not any(x.requires_grad for x in leaf.detach().tensors())
    moved = state.to("cpu")
    assert torch.equal(moved.slots["up"], state.slots["up"])
    assert moved.phase.device.type == "cpu"


def test_attention_state() -> None:
    _, state = run(random_problem(ATTENTION, batch=3, tokens=7))
    assert isinstance(state, AttentionState)
    assert state.keys.shape == (3, 2, 2, 4)  # window 3: two keys are enough to go on
    assert state.length.tolist() == [2, 2, 2]
    assert state.index_select(torch.tensor([1])).rows == 1
    assert state.to("cpu").nbytes == state.nbytes
    _, all_of_it = run(random_problem(models.transformer(), batch=3, tokens=7))
    assert all_of_it.keys.shape[1] == 7


def test_state_size_does_not_grow() -> None:
    for design in (YAAD, TITANS, DELTA, ATTENTION):
        problem = random_problem(design, tokens=30)
        _, state = run(sliced(problem, 0, 4))
        _, later = run(sliced(problem, 4, 30), initial_state=state)
        assert later.nbytes == state.nbytes
        held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in later.tensors()}
        assert sum(held.values()) <= 1.5 * later.nbytes, "a view of something larger"
