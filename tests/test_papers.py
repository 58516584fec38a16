"""The layers typed from their papers, which everything else is tested against, are tested here against other people's code.

fla's naive.py files are the second source. Each is loaded by itself, as fla cannot be imported without Triton. Two are left
out. `ops/titans/naive.py` imports fla, and its inner gradient has lost a parenthesis: `D * grad - grad.sum() / (rstd * D)`
where `ops/ttt/naive.py` has `(D * grad - grad.sum() - ...) / (rstd * D)`. Mamba-2, Longhorn, RetNet's rotations and the
layers around the recurrences have no naive file.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import papers_deep as deep
from tests import papers_matrix as matrix

TOKENS, HEADS, KEYS, VALUES = 20, 2, 6, 4


def naive(op: str) -> ModuleType:
    """fla/ops/<op>/naive.py as a module of its own."""
    package = importlib.util.find_spec("fla")
    assert package is not None and package.submodule_search_locations, "pip install 'torch-miras[test]' brings fla"
    file = Path(package.submodule_search_locations[0], "ops", op, "naive.py")
    spec = importlib.util.spec_from_file_location(f"naive_{op.replace('/', '_')}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def draw(*shape: int) -> Tensor:
    return torch.randn(shape)


def keys_and_values() -> tuple[Tensor, Tensor, Tensor]:
    """q, k [T, H, K] of unit length and v [T, H, V], float32."""
    q, k = (matrix.unit(draw(TOKENS, HEADS, KEYS)) for _ in "qk")
    return q, k, draw(TOKENS, HEADS, VALUES)


def gate(*shape: int) -> Tensor:
    return torch.sigmoid(draw(TOKENS, *(shape or (HEADS,))))


def batched(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[T, H, ...] -> [1, T, H, ...]."""
    return tuple(x[None] for x in tensors)


def head_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[T, H, ...] -> [1, H, T, ...]."""
    return tuple(x.transpose(0, 1)[None] for x in tensors)


def assert_equals_naive(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


# Against fla. What scales q by 1 / sqrt(K) and cannot be told not to is given q sqrt(K). ---------------------------------

UNSCALED = math.sqrt(KEYS)


@pytest.mark.parametrize("normalize", [False, True])
def test_linear_attention(normalize: bool) -> None:
    """Normalised, keys and queries are positive, as the feature map makes them: fla's 1e-10 is our 1e-6 there."""
    q, k, v = keys_and_values()
    q, k = (q.abs() + 0.5, k.abs() + 0.5) if normalize else (q, k)
    theirs, _ = naive("linear_attn").naive_recurrent_linear_attn(*batched(q, k, v), scale=1.0, normalize=normalize)
    assert_equals_naive(matrix.linear_attention_recurrence(q, k, v, normalize), theirs[0])


def test_retention() -> None:
    """fla's is the parallel form, with the decays 1 - 2^(-5-h) inside."""
    q, k, v = keys_and_values()
    theirs = naive("retention").naive_retention(*head_first(q * UNSCALED, k, v))
    assert_equals_naive(matrix.retention(q, k, v, 1 - 2.0 ** (-5 - torch.arange(HEADS))), theirs[0].transpose(0, 1))


def test_retention_with_any_decay() -> None:
    q, k, v = keys_and_values()
    gamma = torch.tensor([0.5, 0.9])
    g = gamma.log().expand(TOKENS, HEADS)
    theirs, _ = naive("simple_gla").naive_recurrent_simple_gla(*batched(q, k, v, g), scale=1.0)
    assert_equals_naive(matrix.retention(q, k, v, gamma), theirs[0])


def test_gated_linear_attention() -> None:
    q, k, v = keys_and_values()
    alpha = gate(HEADS, KEYS)
    theirs, _ = naive("gla").naive_recurrent_gla(*batched(q * UNSCALED, k, v, alpha.log()))
    assert_equals_naive(matrix.gated_linear_attention(q, k, v, alpha), theirs[0])


def test_hgrn2_is_gla_with_tied_keys() -> None:
    q, _, v = keys_and_values()
    f = gate(HEADS, KEYS)
    theirs, _ = naive("gla").naive_recurrent_gla(*batched(q * UNSCALED, 1 - f, v, f.log()))
    assert_equals_naive(matrix.hgrn2_recurrence(q, f, v), theirs[0])


def test_hgrn2_is_hgrn_in_every_entry_of_its_state() -> None:
    """fla's HGRN keeps vectors: every entry (v, k) of HGRN2's state is one of its channels."""
    q, _, v = keys_and_values()
    f = gate(HEADS, KEYS)
    entries = matrix.outer(v, 1 - f), f[:, :, None].expand(-1, -1, VALUES, -1).log()
    states, _ = naive("hgrn").naive_recurrent_hgrn(*batched(*(x.flatten(1) for x in entries)))
    theirs = (states[0].view(TOKENS, HEADS, VALUES, KEYS) @ q[..., None]).squeeze(-1)
    assert_equals_naive(matrix.hgrn2_recurrence(q, f, v), theirs)


def test_state_space() -> None:
    """Mamba-2 has no naive file; it is simple GLA with B of one head, x dt for v and a skip."""
    q, k, v = keys_and_values()
    c, b, dt, a, d = q[:, :1], k[:, :1], gate(), -torch.rand(HEADS) - 0.1, draw(HEADS)
    shared = (x.expand(-1, HEADS, -1) for x in (c, b))
    theirs, _ = naive("simple_gla").naive_recurrent_simple_gla(*batched(*shared, v * dt[..., None], dt * a), scale=1.0)
    assert_equals_naive(matrix.state_space(c, b, v, dt, a, d), theirs[0] + d[:, None] * v)


def test_delta_rule() -> None:
    q, k, v = keys_and_values()
    beta = 2 * gate()
    theirs, _ = naive("delta_rule").delta_rule_recurrence(*head_first(q * UNSCALED, k, v, beta))
    ours = matrix.gated_delta_rule(q, k, v, beta, torch.ones_like(beta))
    assert_equals_naive(ours, theirs[0].transpose(0, 1))


def test_gated_delta_rule() -> None:
    q, k, v = keys_and_values()
    beta, alpha = gate(), gate()
    theirs, _ = naive("gated_delta_rule").naive_recurrent_gated_delta_rule(*batched(q, k, v, beta, alpha.log()), scale=1.0)
    assert_equals_naive(matrix.gated_delta_rule(q, k, v, beta, alpha), theirs[0])


def test_kimi_delta_rule() -> None:
    q, k, v = keys_and_values()
    beta, alpha = gate(), gate(HEADS, KEYS)
    theirs, _ = naive("kda").naive_recurrent_kda(*batched(q, k, v, alpha.log(), beta), scale=1.0)
    assert_equals_naive(matrix.kimi_delta_rule(q, k, v, beta, alpha), theirs[0])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("n", [2, 3])
def test_delta_product(n: int, gated: bool) -> None:
    q, _, _ = keys_and_values()
    k, v, beta = matrix.unit(draw(TOKENS, n, HEADS, KEYS)), draw(TOKENS, n, HEADS, VALUES), 2 * gate(n, HEADS)
    g = gate() if gated else torch.ones(TOKENS, HEADS)
    flat = [x.flatten(0, 1)[None] for x in (k, v)]
    theirs, _ = naive("gated_delta_product").naive_recurrent_gated_delta_product(
        q[None], *flat, g.log()[None] if gated else None, beta.flatten(0, 1)[None], scale=1.0, num_householder=n
    )
    assert_equals_naive(matrix.delta_product_recurrence(q, k, v, beta, g), theirs[0])


def test_longhorn_is_the_delta_rule_at_its_own_rate() -> None:
    """fla has no Longhorn; solving the normal equations is the delta rule at beta / (1 + beta norm(k)^2)."""
    q, _, v = keys_and_values()
    k, beta = draw(TOKENS, HEADS, KEYS), gate()
    step = beta / (1 + beta * k.square().sum(-1))
    theirs, _ = naive("delta_rule").delta_rule_recurrence(*head_first(q * UNSCALED, k, v, step))
    assert_equals_naive(matrix.implicit_recurrence(q, k, v, beta), theirs[0].transpose(0, 1))


def test_diagonal_longhorn_is_gla() -> None:
    """The diagonal transition is GLA's at alpha = 1 - Delta k^2, with the key Delta k."""
    q, _, v = keys_and_values()
    k, beta = draw(TOKENS, HEADS, KEYS), gate()
    step = (beta / (1 + beta * k.square().sum(-1)))[..., None]
    theirs, _ = naive("gla").naive_recurrent_gla(*batched(q * UNSCALED, step * k, v, (1 - step * k * k).log()))
    assert_equals_naive(matrix.diagonal_recurrence(q, k, v, beta), theirs[0])


def test_wkv() -> None:
    """RWKV-7 is fla's diagonal plus low rank with alpha = -kappa and beta = a o kappa."""
    r, k, v = keys_and_values()
    kappa, a, w = matrix.unit(draw(TOKENS, HEADS, KEYS)), gate(HEADS, KEYS), gate(HEADS, KEYS)
    theirs, _ = naive("generalized_delta_rule/dplr").dplr_recurrence(
        *head_first(r * UNSCALED, k, v, -kappa, a * kappa, w.log())
    )
    assert_equals_naive(matrix.wkv(r, w, k, v, kappa, a), theirs[0].transpose(0, 1))


def test_ttt_linear() -> None:
    """As far as fla's TTT goes, which differs from the authors' code in two ways.

    Its eta belongs to the token that is read, and tokens have no rates of their own: it is our token rate, the inner one
    being 1. It adds z, not q, to LN(z) where it reads, so z is its output less ours plus q. It scales q in place.
    """
    tokens, window = 2 * 8, 8
    q, k, v = (draw(tokens, HEADS, VALUES) for _ in "qkv")
    w = {"up": draw(HEADS, VALUES, VALUES) / 2, "up_bias": draw(HEADS, 1, VALUES)}
    gain, shift, token = draw(HEADS, 1, VALUES), draw(HEADS, 1, VALUES), torch.rand(window)
    eta = token.repeat(2)[:, None, None].expand(-1, HEADS, 1)
    theirs, _, _ = naive("ttt").chunk_ttt_linear_ref(
        *batched(q.clone(), k, v),
        w=gain,
        b=shift,
        eta=eta[None],
        scale=1.0,
        eps=matrix.EPS,
        mini_batch_size=window,
        initial_state=w["up"][None],
        initial_state_bias=w["up_bias"][None],
    )
    rates = torch.ones(tokens, HEADS)
    ours = deep.ttt_recurrence(q, k, v, rates, token, w, gain, shift, deep.TTT_LINEAR)
    z = theirs[0] - (ours - q)
    expected = q + gain[:, 0] * F.layer_norm(z, (VALUES,), eps=matrix.EPS) + shift[:, 0]
    assert_equals_naive(ours, expected)


# Inner gradients and the orthogonalisation, against autograd and against the iteration. ------------------------------------


def doubles(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


NETWORKS: dict[str, tuple[deep.Network, tuple[str, ...]]] = {
    "ttt_linear": (deep.TTT_LINEAR, ("up", "up_bias")),
    "ttt_mlp": (deep.TTT_MLP, ("up", "up_bias", "down", "down_bias")),
    "atlas": (deep.Network(deep.mlp_predict, deep.mlp_gradients), ("up", "down")),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_inner_gradients(name: str) -> None:
    """By hand they are autograd's of the loss, and their own derivatives are finite differences."""
    network, names = NETWORKS[name]
    width = 3 if name == "ttt_linear" else 5
    sizes = {"up": (3, width), "up_bias": (1, width), "down": (width, 3), "down_bias": (1, 3)}
    w = {n: doubles(HEADS, *sizes[n]) for n in names}
    x, target, gain, shift = (doubles(HEADS, 1, 3) for _ in range(4))
    y = F.layer_norm(network.predict(w, x), (3,), eps=matrix.EPS) * gain + shift
    loss = (y - target).square().sum() / 2
    expected = torch.autograd.grad(loss, list(w.values()))
    found = network.gradients(w, x, target, gain, shift)
    for n, g in zip(names, expected, strict=True):
        torch.testing.assert_close(found[n], g, atol=1e-12, rtol=1e-12)

    def gradients(*args: Tensor) -> tuple[Tensor, ...]:
        rest = args[len(names) :]
        return tuple(network.gradients(dict(zip(names, args, strict=False)), *rest).values())

    assert torch.autograd.gradcheck(gradients, (*w.values(), x, target, gain, shift))


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
@pytest.mark.parametrize("rank", [1, 3])
def test_newton_schulz(shape: tuple[int, int], rank: int) -> None:
    """The singular values' way is the matrix iteration, in value and in gradient, at a deficient rank too."""
    rows, columns = shape
    s = (doubles(2, rows, rank) @ doubles(2, rank, columns)).detach().requires_grad_()
    weight = doubles(2, rows, columns).detach()
    y = s / (s.square().sum((-2, -1), keepdim=True) + 1e-12).sqrt()
    for _ in range(5):
        y = 3.4445 * y - 4.7750 * (y @ y.mT @ y) + 2.0315 * (y @ y.mT @ y @ y.mT @ y)
    expected = y * s.norm(dim=(-2, -1), keepdim=True) / math.sqrt(min(shape))
    ours = deep.newton_schulz(s, 5)
    torch.testing.assert_close(ours, expected, atol=1e-11, rtol=1e-11)
    mine, theirs = (torch.autograd.grad((weight * out).sum(), s)[0] for out in (ours, expected))
    torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=1e-9)
