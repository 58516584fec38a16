"""Titans, typed from its paper, against titans-pytorch 0.5.5, whose NeuralMemory computes the same at the right settings.

    chunk_size=1           a rate, a momentum factor and a decay for each token; longer chunks average them, and a token
                           that does not end its chunk is read without what the chunk wrote
    batch_size=refresh     gradients are taken at the last weights of the batch before
    model                  a module without other parameters than up and down; its own default adapts the norm's gain too
    store_memory_loss_fn   1/2 norm(e)^2; its default is the mean of e^2
    pre_rmsnorm=False      q, k and v are the projections alone

It reads after it writes, and decays towards the origin, as the paper prints it.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.papers_deep import Weights, mlp_gradients, mlp_predict
from tests.papers_matrix import EPS, normal

TOKENS, WIDTH, HIDDEN = 20, 6, 12


class Residual(nn.Module):
    """x + LN(gelu(x up) down)."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(WIDTH, HIDDEN) / 2)
        self.down = nn.Parameter(torch.randn(HIDDEN, WIDTH) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.layer_norm(F.gelu(x @ self.up) @ self.down, (WIDTH,), eps=EPS)


def titans(q: Tensor, k: Tensor, v: Tensor, theta: Tensor, eta: Tensor, alpha: Tensor, w: Weights, refresh: int) -> Tensor:
    """Titans (2501.00663), Eq. 12-14, gradients at window starts: S_t = eta_t S_{t-1} - theta_t grad l(M_r; k_t, v_t),

    M_t = (1 - alpha_t) M_{t-1} + S_t, out M_t(q_t); M(x) = x + LN(MLP(x)), q, k, v [T, 1, V], and l = 1/2 norm(M(k) - v)^2.
    """
    gain, shift = torch.ones_like(q[0]), torch.zeros_like(q[0])
    s, out, point = {name: torch.zeros_like(x) for name, x in w.items()}, [], w
    for t in range(len(q)):
        if t % refresh == 0:
            point = w
        gradients = mlp_gradients(point, k[t], v[t] - k[t], gain, shift)
        s = {name: eta[t] * s[name] - theta[t] * gradients[name] for name in w}
        w = {name: (1 - alpha[t]) * w[name] + s[name] for name in w}
        out.append(q[t] + normal(mlp_predict(w, q[t])))
    return torch.stack(out)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
@pytest.mark.parametrize("refresh", [1, 4, 16])
def test_titans(refresh: int, dtype: torch.dtype, tolerance: float) -> None:
    """In outputs and gradients; small rates and decays, since a norm behind fast decay to the origin magnifies rounding."""
    from titans_pytorch.neural_memory import NeuralMemory

    layer = NeuralMemory(
        WIDTH,
        chunk_size=1,
        batch_size=refresh,
        model=Residual(),
        mem_model_norm_add_residual=False,
        pre_rmsnorm=False,
        store_memory_loss_fn=lambda y, v: (y - v).square().sum(-1) / 2,
        adaptive_step_transform=torch.sigmoid,
    ).to(dtype)
    with torch.no_grad():
        layer.to_decay_factor[0].bias -= 4
        layer.to_adaptive_step[0].bias -= 2
    x = torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    theirs, _ = layer(x[None])
    q, k, v = (project(x)[:, None] for project in (layer.to_queries, layer.to_keys, layer.to_values))
    gates = layer.to_adaptive_step, layer.to_momentum, layer.to_decay_factor
    theta, eta, alpha = (torch.sigmoid(gate[0](x))[:, :, None] for gate in gates)
    initial = {name: p[0] for name, p in layer.memory_model_parameter_dict.items()}
    ours = titans(q, k, v, theta, eta, alpha, initial, refresh)[:, 0]
    torch.testing.assert_close(theirs[0], ours, atol=tolerance, rtol=tolerance)
    weight = torch.randn_like(ours)
    (dx,), (expected,) = (torch.autograd.grad((weight * out).sum(), x) for out in (theirs[0], ours))
    scale = expected.abs().max()
    torch.testing.assert_close(dx / scale, expected / scale, atol=tolerance, rtol=0.0)
