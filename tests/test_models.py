"""Each named model against a recurrence of ten lines, written from its own paper, in outputs and gradients.

The matrix models start from S_0 = 0, as their papers do. The deep ones are given sizes here, and take from `miras.models`
what makes them the model they are: the loss, the link, the learner.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import miras
from miras import memory, models, retention
from miras.arrangement import make_mixer
from miras.bias import Huber, Lp
from miras.design import Arrangement, Design, Pattern, design_from
from miras.inputs import Constant, Plain
from tests.problems import Problem, assert_close, assert_same, differentiable, probe, random_problem

TOKENS = 11

Step = dict[str, Any]


def streams(problem: Problem) -> list[list[list[Step]]]:
    """One dictionary a token, of one head of one row: q, k, v, eta, alpha and gates."""
    q = problem["q"]

    def at(b: int, t: int, h: int) -> Step:
        step = {name: problem[name][b, t, h] for name in ("q", "k", "v")}
        if "lr" in problem:
            step["eta"] = problem["lr"][b, t, h]
            log_decay = problem["log_decay"]
            step["alpha"] = torch.ones((), dtype=q.dtype) if log_decay is None else log_decay[b, t, h].exp()
            step |= {name: x[b, t, h] for name, x in problem["gates"].items()}
        return step

    return [[[at(b, t, h) for t in range(q.shape[1])] for h in range(q.shape[2])] for b in range(q.shape[0])]


def check(problem: Problem, recurrence: Callable[..., list[Tensor]]) -> None:
    """The model's outputs and gradients are those of `recurrence(steps, weights of the head)`."""
    ours, ours_leaves = differentiable(problem)
    out, _ = miras.memorize(**ours)
    probe(out).backward()
    theirs, leaves = differentiable(problem)
    weights = theirs.get("weights", {})
    rows = [
        torch.stack(
            [torch.stack(recurrence(steps, {name: w[h] for name, w in weights.items()})) for h, steps in enumerate(heads)],
            dim=1,
        )
        for heads in streams(theirs)
    ]
    expected = torch.stack(rows)
    probe(expected).backward()
    assert_close(out, expected, "out")
    for name, x in leaves.items():
        if x.grad is not None:  # S_0 = 0 is a constant in the papers
            assert_close(ours_leaves[name].grad, x.grad, f"d {name}")


def problem_of(design: Design, zero: bool = False, **options: Any) -> Problem:
    problem = random_problem(design, **{"tokens": TOKENS, "width": 3, **options})
    if zero:
        problem["weights"] = {name: torch.zeros_like(w) for name, w in problem["weights"].items()}
    return problem


def linear_attention(steps: list[Step], _: dict[str, Tensor]) -> list[Tensor]:
    """Katharopoulos et al. 2020, Eq. 18-20 without the normaliser: s_i = s_{i-1} + phi(k_i) v_i^T, y_i = phi(q_i)^T s_i."""
    s, out = torch.zeros(3, 3, dtype=torch.float64), []
    for x in steps:
        s = s + torch.outer(x["k"], x["v"])
        out.append(x["q"] @ s)
    return out


def deltanet(steps: list[Step], _: dict[str, Tensor]) -> list[Tensor]:
    """Yang et al. 2024, Eq. 3: S_t = S_{t-1} - beta_t (S_{t-1} k_t - v_t) k_t^T, o_t = S_t q_t."""
    s, out = torch.zeros(3, 3, dtype=torch.float64), []
    for x in steps:
        s = s - x["eta"] * torch.outer(s @ x["k"] - x["v"], x["k"])
        out.append(s @ x["q"])
    return out


def gated_deltanet(steps: list[Step], _: dict[str, Tensor]) -> list[Tensor]:
    """Yang et al. 2024 (2412.06464), Eq. 10: S_t = S_{t-1} (alpha_t (I - beta_t k_t k_t^T)) + beta_t v_t k_t^T."""
    s, out, eye = torch.zeros(3, 3, dtype=torch.float64), [], torch.eye(3, dtype=torch.float64)
    for x in steps:
        s = s @ (x["alpha"] * (eye - x["eta"] * torch.outer(x["k"], x["k"]))) + x["eta"] * torch.outer(x["v"], x["k"])
        out.append(s @ x["q"])
    return out


def test_linear_attention() -> None:
    problem = problem_of(models.linear_attention(), zero=True, decay=None)
    problem["lr"] = torch.ones_like(problem["lr"])
    check(problem, linear_attention)


def test_deltanet() -> None:
    check(problem_of(models.deltanet(), zero=True, decay=None), deltanet)


def test_gated_deltanet() -> None:
    check(problem_of(models.gated_deltanet(), zero=True), gated_deltanet)


@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_transformer(window: int | None) -> None:
    """Vaswani et al. 2017, Eq. 1, over the last `window` tokens; Miras Eq. 10."""

    def attention(steps: list[Step], _: dict[str, Tensor]) -> list[Tensor]:
        out = []
        for t, x in enumerate(steps):
            seen = steps[0 if window is None else max(0, t - window + 1) : t + 1]
            scores = torch.stack([(x["q"] @ past["k"]) / math.sqrt(3) for past in seen])
            weights = scores.exp() / scores.exp().sum()
            out.append(sum(w * past["v"] for w, past in zip(weights, seen, strict=True)))
        return out

    check(problem_of(models.transformer(window)), attention)


def mlp(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """Miras Sec. 5.3: x + LN(W_2 gelu(W_1 x))."""
    y = torch.nn.functional.gelu(x @ w["up"]) @ w["down"]
    y = torch.nn.functional.layer_norm(y, y.shape, eps=1e-5)
    return x + y * w.get("norm.weight", 1) + w.get("norm.bias", 0)


FAST = ("up", "down")


def inner(loss: Callable[[Tensor, Step], Tensor], w: dict[str, Tensor], x: Step) -> dict[str, Tensor]:
    """grad_W loss(M(W; k_t), v_t)."""
    value = loss(mlp(w, x["k"]) - x["v"], x)
    return dict(zip(FAST, torch.autograd.grad(value, [w[n] for n in FAST], create_graph=True), strict=True))


def titans(refresh: int, anchored: bool) -> Callable[..., list[Tensor]]:
    """Titans Eq. 12-14: l = ||M(k) - v||^2 / 2, S_t = eta_t S_{t-1} - theta_t grad l, M_t = (1 - alpha_t) M_{t-1} + S_t."""

    def recurrence(steps: list[Step], start: dict[str, Tensor]) -> list[Tensor]:
        m = window = dict(start)
        s, out = {n: torch.zeros_like(m[n]) for n in FAST}, []
        for t, x in enumerate(steps):
            if t % refresh == 0:
                window = m
            g = inner(lambda e, x: 0.5 * (e @ e), window, x)
            a = start if anchored else {n: 0 * start[n] for n in FAST}
            s = {n: x["mu"] * s[n] - x["eta"] * g[n] for n in FAST}
            m = start | {n: a[n] + x["alpha"] * (m[n] - a[n]) + s[n] for n in FAST}
            out.append(mlp(m, x["q"]))
        return out

    return recurrence


def miras_recurrence(
    loss: Callable[[Tensor, Step], Tensor],
    link: Callable[[Tensor], Tensor],
    kappa: Callable[[Tensor], Any] | None,
    refresh: int,
    anchored: bool,
) -> Callable[..., list[Tensor]]:
    """Miras Sec. 5.3: A_t = alpha_t A_{t-1} - eta_t grad l(W; k_t, v_t), W_t = link(A_t), around the anchor; with kappa the
    link is taken at window ends, W_r + kappa(A_r) (A_t - A_r) in between."""

    def recurrence(steps: list[Step], start: dict[str, Tensor]) -> list[Tensor]:
        a = window = dict(start)
        out = []
        for t, x in enumerate(steps):
            if t % refresh == 0:
                window = a
            at_window = start | {n: link(window[n]) for n in FAST}
            g = inner(loss, at_window, x)
            anchor = start if anchored else {n: 0 * start[n] for n in FAST}
            a = start | {n: anchor[n] + x["alpha"] * (a[n] - anchor[n]) - x["eta"] * g[n] for n in FAST}
            read = start | {n: link(a[n]) for n in FAST}
            if kappa is not None and (t + 1) % refresh:
                read = start | {n: at_window[n] + kappa(window[n]) * (a[n] - window[n]) for n in FAST}
            out.append(mlp(read, x["q"]))
        return out

    return recurrence


DEEP = {"memory": memory.MLP(depth=2, expansion=2.0), "refresh": 4}


@pytest.mark.parametrize("anchor", ["initial", "origin"])
@pytest.mark.parametrize("refresh", [1, 4])
def test_titans(refresh: int, anchor: str) -> None:
    design = models.titans_lmm(memory=DEEP["memory"], refresh=refresh, anchor=anchor)
    check(problem_of(design, slow=True), titans(refresh, anchor == "initial"))


HUBER: dict[str, Callable[[Tensor, Step], Tensor]] = {
    "coordinate": lambda e, x: torch.where(e.abs() <= x["delta"], e * e / 2, x["delta"] * (e.abs() - x["delta"] / 2)).sum(),
    "norm": lambda e, x: e @ e / 2 if e.norm() <= x["delta"] else x["delta"] * (e.norm() - x["delta"] / 2),
    "switch": lambda e, x: e @ e / 2 if e.norm() <= x["delta"] else x["delta"] * e.abs().sum(),
}


@pytest.mark.parametrize("anchor", ["initial", "origin"])
@pytest.mark.parametrize("form", HUBER)
def test_yaad(form: str, anchor: str) -> None:
    """Miras Eq. 26 (`switch`) and its continuous forms; one of them is the default."""
    default = models.yaad(**DEEP, anchor=anchor)
    assert isinstance(default.bias, Huber)
    assert default.bias.form in HUBER
    assert default.retention.identity
    design = replace(default, bias=Huber(form))
    check(problem_of(design, slow=True), miras_recurrence(HUBER[form], lambda a: a, None, 4, anchor == "initial"))


LQ: dict[str, tuple[retention.Retention, Callable[[Tensor], Tensor], Callable[[Tensor], Any]]] = {
    "printed": (
        retention.Lq(4.0),
        lambda a: a / (a**4).sum().sqrt(),
        lambda a: 1 / (a**4).sum().sqrt(),
    ),
    "root mean powers": (
        retention.LqRms(4.0, 0.3),
        lambda a: 0.3 * a / (a**4).mean().sqrt(),
        lambda a: 0.3 / (a**4).mean().sqrt(),
    ),
    "mirror": (
        retention.LqMirror(4.0),
        lambda a: a**3 / (a**4).sum().sqrt(),
        lambda a: (a**4).sum() / (a**4).sum().sqrt() / (a * a).sum(),
    ),
}


@pytest.mark.parametrize("link_at", ["token", "refresh"])
@pytest.mark.parametrize("name", LQ)
def test_moneta(name: str, link_at: str) -> None:
    """Miras Eq. 24: l_p loss, W = A / ||A||_4^2, and the two corrections of it; one of them is the default."""
    default = models.moneta(**DEEP, link_at=link_at)
    assert isinstance(default.bias, Lp)
    assert isinstance(default.retention, (retention.Lq, retention.LqRms, retention.LqMirror))
    choice, link, kappa = LQ[name]

    def loss(e: Tensor, _: Step) -> Tensor:
        return ((e * e + 1e-6) ** (default.bias.p / 2)).sum() / default.bias.p

    design = replace(default, retention=choice)
    expected = miras_recurrence(loss, link, kappa if link_at == "refresh" else None, 4, design.anchor == "initial")
    check(problem_of(design, slow=True), expected)


SIMPLEX: dict[str, tuple[retention.Retention, Callable[[Tensor], Tensor], Callable[[Tensor], Any]]] = {
    "softmax": (retention.KL(), lambda a: len(a) * a.softmax(0), lambda a: 1.0),
    "softmax of mass 5": (retention.KL(5.0), lambda a: 5 * a.softmax(0), lambda a: 5 / len(a)),
    "signed": (retention.SignedKL(), lambda a: len(a) * a.sinh() / a.cosh().sum(0), lambda a: 1.0),
}


@pytest.mark.parametrize("link_at", ["token", "refresh"])
@pytest.mark.parametrize("name", SIMPLEX)
def test_memora(name: str, link_at: str) -> None:
    """Miras Eq. 27: L2 loss, W = softmax(alpha log W - eta grad), which is softmax of A; or on the signed simplex.

    Recentring A at window ends changes no softmax, and its tangent only where A decays; so nothing decays there.
    """
    default = models.memora(**DEEP, link_at=link_at)
    assert isinstance(default.retention, (retention.KL, retention.SignedKL, retention.FDivergence))
    assert type(default.bias).__name__ == "L2"
    choice, link, kappa = SIMPLEX[name]
    design = replace(default, retention=choice)
    problem = problem_of(design, slow=True)
    if isinstance(choice, retention.KL) and link_at == "refresh":
        problem["log_decay"] = None
    expected = miras_recurrence(
        lambda e, _: e @ e / 2, link, kappa if link_at == "refresh" else None, 4, design.anchor == "initial"
    )
    check(problem, expected)


def test_memora_multiplies_weights() -> None:
    """The same in the weights themselves, as Eq. 27 prints it: W_t proportional to W_{t-1}^alpha exp(-eta grad)."""
    design = models.memora(memory=DEEP["memory"], refresh=1, retention=retention.KL(1.0), link_at="token", anchor="origin")
    problem = problem_of(design)

    def recurrence(steps: list[Step], start: dict[str, Tensor]) -> list[Tensor]:
        w, out = {n: start[n].softmax(0) for n in FAST}, []
        for x in steps:
            g = inner(lambda e, _: e @ e / 2, w, x)
            raised = {n: w[n] ** x["alpha"] * (-x["eta"] * g[n]).exp() for n in FAST}
            w = {n: raised[n] / raised[n].sum(0) for n in FAST}
            out.append(mlp(w, x["q"]))
        return out

    check(problem, recurrence)


# The list of them. ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", models.NAMED)
def test_named_models_are_designs(name: str) -> None:
    """Each goes through JSON, takes overrides, has a layer that runs on it, and says what it is and where it is from."""
    function = models.NAMED[name]
    design = function()
    assert isinstance(design, (Design, Arrangement, Pattern))
    assert design_from(json.loads(json.dumps(design.to_dict()))) == design
    assert models.named(name) == design
    assert function.__doc__
    for element in design.designs:
        layer = make_mixer(element, 32, 2)
        out, _, _ = layer(torch.randn(2, 5, 32))
        assert out.shape == (2, 5, 32)
        assert torch.isfinite(out).all()
    changed = function(refresh=1, gradient_at="previous")
    assert changed.parts[0].refresh == 1


def test_structure_is_the_table_of_the_models() -> None:
    """Section 4 of the contract: memory, bias, retention and learner of each model, whatever its numbers."""
    kinds = {
        name: [tuple(getattr(part, "kind", None) for part in (d.memory, d.bias, d.retention, d.learning)) for d in f().parts]
        for name, f in models.NAMED.items()
    }
    attention = (None, "L2", None, "NonParametric")
    assert kinds["linear_attention"] == [("Matrix", "Dot", "L2", "GradientDescent")]
    assert kinds["deltanet"] == kinds["gated_deltanet"] == [("Matrix", "L2", "L2", "GradientDescent")]
    assert kinds["titans_lmm"] == [("MLP", "L2", "L2", "Momentum")]
    assert kinds["yaad"] == [("MLP", "Huber", "L2", "GradientDescent")]
    assert kinds["transformer"] == [attention]
    assert kinds["moneta"][0][:2] == ("MLP", "Lp")
    assert kinds["memora"][0][:2] == ("MLP", "L2")
    for name in ("titans_mac", "titans_mag", "titans_mal"):
        assert kinds[name] == [kinds["titans_lmm"][0], attention]
        assert models.NAMED[name](num_persistent=3).parts[1].learning.persistent == 3
    assert models.titans_mac().segment == 64
    assert models.titans_mag(window=32).attention.learning.window == 32
    assert models.titans_mal(window=32).designs[1].learning.window == 32
    for name in ("moneta", "yaad", "memora"):
        assert kinds[f"{name}_h"] == [kinds[name][0], attention]
        window = models.NAMED[f"{name}_h"](window=32).designs[1].learning.window
        assert window == 32
    for name in ("deltanet", "gated_deltanet", "linear_attention"):
        assert models.NAMED[name]().refresh == 1
    assert models.gated_deltanet().gradient_at == "decayed"
    assert models.gated_deltanet().inputs.decay is not None
    assert models.deltanet().inputs.decay is models.linear_attention().inputs.decay is None
    assert type(models.transformer().inputs.features).__name__ == "Rotary"
    assert type(models.linear_attention().inputs.features).__name__ == "Positive"


def test_named() -> None:
    assert models.named("yaad", refresh=3).refresh == 3
    assert models.named("yaad", bias={"kind": "Lp", "p": 2.0}).bias == Lp(2.0)
    changed = models.named("yaad", inputs={"weight_std": 0.125}).inputs
    assert changed == replace(models.yaad().inputs, weight_std=0.125)
    with pytest.raises(ValueError, match=r"no model 'yad'; allowed: .*did you mean 'yaad'"):
        models.named("yad")
    plain = models.named("yaad", inputs={"features": {"kind": "Plain"}, "rate": {"kind": "Constant", "value": 0.5}}).inputs
    assert (plain.features, plain.rate) == (Plain(), Constant(0.5))
    assert models.named("ttt_mlp", inputs={"gates": {"token": {"kind": "Constant"}}}).inputs.gates == {"token": Constant()}
    with pytest.raises(ValueError, match="Design: refresh=None; must be a whole number"):
        models.named("yaad", refresh=None)
    with pytest.raises(ValueError, match=r"model 'yaad': .*refres.*a design has memory, bias"):
        models.named("yaad", refres=3)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("hgrn2", {"lower_bound": 0.5}),
        ("deltanet", {"negative_eigenvalues": True}),
        ("linear_attention", {"normalizer": True}),
        ("omeganet", {"window": 8}),
        ("ttt_linear", {"refresh": 32}),
    ],
)
def test_named_inputs_are_the_model_s_with_its_arguments(name: str, arguments: dict[str, Any]) -> None:
    own = models.named(name, **arguments)
    changed = models.named(name, **arguments, inputs={"weight_std": 0.5})
    assert changed == replace(own, inputs=replace(own.inputs, weight_std=0.5))


def test_public_functions_are_named() -> None:
    """Every public function that makes a design can be looked up by its name."""
    makers = {
        name
        for name, f in vars(models).items()
        if inspect.isfunction(f)
        and f.__module__.startswith(models.__name__)
        and not name.startswith("_")
        and name != "named"
        and inspect.signature(f).return_annotation in ("Design", "MemoryAsContext", "MemoryAsGate", "Pattern")
    }
    assert makers == set(models.NAMED)


def test_problems_of_two_runs_are_equal() -> None:
    """The random problems of this suite are the same every time."""
    a, b = (problem_of(models.yaad(**DEEP)) for _ in range(2))
    assert_same({"q": a["q"], **a["weights"]}, {"q": b["q"], **b["weights"]}, tolerance=0.0)
