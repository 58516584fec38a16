"""Designs in symbols: formulas assembled from the choices, sources from docstrings, facts instead of names."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from torch import Tensor

from miras import bias, inputs, learning, memory, models, retention
from miras.describe import Section, describe, describe_named, formula, label, parts, sections, source, summary
from miras.design import Design, Pattern
from miras.kernels import fused, native

GATED_DELTANET = """\
At each token t
  gradient at  W' = alpha_t A_{t-1}
  prediction   y_t = M(W'; k_t) = k_t W'
  loss         l_t = 1/2 ||e_t||^2
               e_t = y_t - v_t
  gradient     g_t = dl_t/dy_t = e_t
               G_t = k_t^T g_t
  step         u_t = -eta_t G_t
               A_t = alpha_t A_{t-1} + u_t
               A_0 the learned initial memory
  link         W_t = A_t
  read-out     o_t = M(W_t; q_t) = q_t W_t
"""

MONETA = """\
At each token t
  gradient at  W' = W_r, r the last token before the window of 16 that t is in
  prediction   y_t = M(W'; k_t) = k_t + LN(gelu(k_t up') down')
  loss         l_t = 1/3 sum |e_t|^3
               e_t = y_t - v_t
  gradient     g_t = dl_t/dy_t = sign(e_t) |e_t|^2
               G_t = dl_t/dW at W', back-propagated from g_t to up, down
  step         u_t = -eta_t G_t
               D_t = alpha_t D_{t-1} + u_t
               A_t = A_0 + D_t,  D_0 = 0,  A_0 the learned initial memory
  link         W_t = 0.3 A_t / mean(|A_t|^4)^(1/2) at window ends,  W_r + kappa_r (A_t - A_r) in
                 between, kappa_r the link's slope at A_r
  read-out     o_t = M(W_t; q_t) = q_t + LN(gelu(q_t up_t) down_t)
"""


@dataclass(frozen=True)
class HalfSquare(bias.L2):
    """Half the squared error, again.

    It is printed twice.
    Source: nobody
    (2026), Eq. 1.

    The rest.
    """

    weight: float = 2.0

    def loss(self, y: Tensor, v: Tensor, gates: bias.Gates) -> Tensor:
        return self.weight * super().loss(y, v, gates)


def lines(design: Design) -> dict[str, list[str]]:
    """Texts of the lines by name; those without a name belong to the one before."""
    found: dict[str, list[str]] = {}
    name = ""
    for section in sections(design):
        for line in section.lines:
            name = line.name or name
            found.setdefault(name, []).extend(line.text.splitlines())
    return found


@pytest.mark.parametrize(("design", "text"), [(models.gated_deltanet(), GATED_DELTANET), (models.moneta(), MONETA)])
def test_recurrences(design: Design, text: str) -> None:
    assert text in describe(design)


@pytest.mark.parametrize("name", models.NAMED)
def test_every_model_fits_its_lines(name: str) -> None:
    for width in (80, 140):
        text = describe_named(name, {}, width=width)
        assert text.isascii()
        assert max(map(len, text.splitlines())) <= width


def test_sources_are_the_docstrings() -> None:
    text = describe(models.titans_lmm())
    assert "Source: Titans (arXiv 2501.00663) Eq. 13-14." in text
    assert source(learning.Momentum) == "Titans (arXiv 2501.00663) Eq. 13-14."
    assert source(HalfSquare) == "nobody (2026), Eq. 1."
    assert source(memory.Matrix) is None
    assert summary(HalfSquare) == "Half the squared error, again."
    head = describe_named("gated_deltanet", {}).splitlines()[:3]
    assert head[0] == "gated_deltanet"
    assert head[2] == "  Source: arXiv 2412.06464, Eq. 10."


def test_where_the_gradient_is_taken() -> None:
    def point(**changes: object) -> str:
        return lines(models.yaad(**changes))["gradient at"][0]

    assert point(refresh=1) == "W' = W_{t-1}"
    assert point(refresh=1, gradient_at="decayed") == "W' = A_0 + alpha_t (A_{t-1} - A_0)"
    assert point(refresh=1, gradient_at="decayed", retention=retention.KL(), anchor="origin") == "W' = link(alpha_t A_{t-1})"
    steps = {"learning": learning.MultiStep(2), "bias": bias.L2()}
    assert point(refresh=1, **steps) == "W' = W_{t-1} for the first step, then where the step before led"
    assert point(refresh=8, **steps).startswith("W' = W_r, r the last gradient step before the window of 8")
    assert lines(models.linear_attention())["gradient at"] == ["any W': the gradient does not depend on the weights"]


def test_steps() -> None:
    assert lines(models.deltanet())["step"][1] == "A_t = A_{t-1} + u_t"
    several = lines(models.gated_deltanet(learning=learning.MultiStep(2), bias=bias.Huber("norm")))
    assert several["step"][:2] == ["u_tj = -eta_tj G_tj,  j = 1 .. 2", "A_t = alpha_t A_{t-1} + u_t1 + u_t2"]
    assert several["gradient"] == ["g_tj = dl_tj/dy_tj = e_tj min(1, delta_tj / ||e_tj||)", "G_tj = k_tj^T g_tj"]
    assert lines(models.yaad(retention=retention.KL()))["settling"] == ["A <- A - mean_in(A) at window ends"]


def test_gates_say_how_they_are_made() -> None:
    found = lines(models.yaad())
    assert found["gate"] == ["delta_t = softplus(gate_projs.delta(x_t) + bias),  one a head, data dependent"]
    assert found["rate"] == ["eta_t = 2 sigmoid(b_proj(x_t) + bias),  one a head, data dependent"]
    assert found["q, k, v"] == ["each silu(conv4(proj(x_t)))"]
    assert found["norm"] == ["gain and bias learned, one a channel, gain 1.4 / sqrt(d) at first"]
    low = inputs.Inputs(rate=inputs.Constant(0.5), decay=inputs.LogDecay(per_channel=True, rank=8), conv_size=0)
    found = lines(models.gated_deltanet(inputs=low))
    assert found["rate"] == ["eta_t = 0.5,  one a head, not data dependent"]
    assert found["decay"][0].endswith("one a channel, data dependent of rank 8")
    assert found["q, k, v"] == ["each silu(proj(x_t))"]


def test_scaled_queries_and_token_shifts_are_told() -> None:
    assert lines(models.gla())["features"] == ["q, k, v <- q, k, v", "q <- q / sqrt(K)"]
    assert lines(models.rwkv7())["token shift"] == ["x_t <- x_t + m * (x_{t-1} - x_t), m learned for each use"]
    assert "token shift" not in lines(models.gla())


@pytest.mark.parametrize("compiler", [(), ("g++",)])
def test_the_path_and_the_faster_ones(compiler: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """What this machine runs."""
    monkeypatch.setattr(fused, "has_compiler", lambda: bool(compiler))
    monkeypatch.setattr(native, "compiler", lambda: compiler)
    assert lines(models.yaad())["path"] == ["native" if compiler else "frozen, in blocks of 16 gradient steps"]
    found = lines(models.moneta(link_at="token"))
    faster = ["attention", "fla", "triton", *([] if compiler else ["native", "triangular", "fused", "substituted"])]
    assert [name.removeprefix("not ") for name in found if name.startswith("not ")] == faster
    if not compiler:
        assert found["not triangular"] == ["the link of retention LqRms is not the identity"]


def test_sizes() -> None:
    found = lines(models.titans_lmm())
    assert found["fast weights"] == ["up 64 x 256,  down 256 x 64"]
    assert found["state"] == ["98,304 numbers = 24 d^2: 3 copies of the fast weights, one of them the gradient point"]
    assert lines(models.transformer())["state"] == ["128 numbers for each token of context"]
    assert lines(models.transformer(window=5))["state"] == ["512 numbers"]


def test_a_choice_without_its_own_formula_gives_its_docstring() -> None:
    assert HalfSquare().symbols == bias.L2().symbols
    assert formula(HalfSquare()) == "Half the squared error, again."
    found = lines(models.yaad(bias=HalfSquare()))
    assert found["bias"] == ["HalfSquare(2):  Half the squared error, again."]
    assert found["loss"] == ["l_t = l(y_t, v_t): Half the squared error, again."]
    assert found["gradient"][0] == "g_t = dl_t/dy_t"


def test_a_loss_alone_is_a_formula() -> None:
    @dataclass(frozen=True)
    class Cosh(bias.Bias):
        @property
        def symbols(self) -> str:
            return "l = sum log(cosh(e))"

    found = lines(models.yaad(bias=Cosh()))
    assert found["loss"] == ["l_t = sum log(cosh(e_t))", "e_t = y_t - v_t"]
    assert found["gradient"][0] == "g_t = dl_t/dy_t"


def test_labels() -> None:
    assert label(learning.OmegaMuon(3)) == "OmegaMuon(3)"
    assert label(retention.LqRms(4.0, 0.3)) == "LqRms(4, 0.3)"
    assert label(memory.MLP()) == "MLP(2)"
    assert label(memory.MLP(residual=False)) == "MLP(2, residual=False)"
    assert label(bias.Envelope(bias.Huber("norm"))) == "Envelope(Huber(norm))"
    assert label(inputs.Normalized()) == "Normalized"
    assert label(inputs.Normalized(True)) == "Normalized(True)"
    assert label(learning.NonParametric()) == label(learning.NonParametric(None)) == "NonParametric"
    assert label(inputs.Sigmoid(0.5, per_channel=True)) == "Sigmoid(0.5, per_channel=True)"


def test_parts() -> None:
    a, b = models.yaad(), models.transformer()
    assert parts(a) == [("", a)]
    assert parts(Pattern((a, b, a))) == [("1/3, 3/3", a), ("2/3", b)]
    text = describe_named("yaad_h", {"refresh": 32})
    assert text.startswith("yaad_h with refresh=32\n\nLayer 1/2\n\nChoices")
    assert "Layer 2/2\n\nChoices" in text
    assert "the window of 32" in text


def test_overrides_and_errors() -> None:
    text = describe_named("yaad", {"refresh": 1, "bias": {"kind": "Lp", "p": 2.0}})
    assert "l = 1/2 sum |e|^2" in text
    assert "Huber" not in text
    with pytest.raises(ValueError, match=r"no model 'yad'; .*did you mean 'yaad'"):
        describe_named("yad", {})


def test_sections_are_data() -> None:
    assert all(isinstance(section, Section) and section.lines for section in sections(models.memora()))
