"""The contract once more, in numpy float64, one head of one sequence, with gradients derived by hand.

Nothing here comes from the package: memories, losses, links and learners are written out again from the published
formulas, so that an error would have to be made twice to go unseen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Weights = dict[str, Array]
Gates = dict[str, float]

erf = np.vectorize(math.erf)


# Memories: forward(W, x) -> y, gradients(W, x, dy) -> {name: x_in dy_out^T}. --------------------------------------------


def matrix(weights: Weights, x: Array, dy: Array | None = None) -> Any:
    """y = x W;  dW = x dy^T."""
    return x @ weights["W"] if dy is None else {"W": np.outer(x, dy)}


def vector(weights: Weights, x: Array, dy: Array | None = None) -> Any:
    """y = x * w;  dw = x * dy."""
    return x * weights["w"][0] if dy is None else {"w": (x * dy)[None]}


def gated_mlp(weights: Weights, x: Array, dy: Array | None = None) -> Any:
    """y = (silu(x G) * (x U)) D."""
    a, b = x @ weights["gate"], x @ weights["up"]
    s = 1 / (1 + np.exp(-a))
    h = a * s * b
    if dy is None:
        return h @ weights["down"]
    dh = weights["down"] @ dy
    return {
        "gate": np.outer(x, dh * b * (s + a * s * (1 - s))),
        "up": np.outer(x, dh * a * s),
        "down": np.outer(h, dy),
    }


def _gelu(z: Array) -> tuple[Array, Array]:
    cdf = 0.5 * (1 + erf(z / math.sqrt(2)))
    return z * cdf, cdf + z * np.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def _gelu_tanh(z: Array) -> tuple[Array, Array]:
    c = math.sqrt(2 / math.pi)
    t = np.tanh(c * (z + 0.044715 * z**3))
    return 0.5 * z * (1 + t), 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * c * (1 + 3 * 0.044715 * z * z)


def _silu(z: Array) -> tuple[Array, Array]:
    s = 1 / (1 + np.exp(-z))
    return z * s, s + z * s * (1 - s)


def _tanh(z: Array) -> tuple[Array, Array]:
    return np.tanh(z), 1 - np.tanh(z) ** 2


def _relu(z: Array) -> tuple[Array, Array]:
    return np.maximum(z, 0), (z > 0).astype(float)


ACTIVATIONS = {
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _silu,
    "tanh": _tanh,
    "relu": _relu,
    "identity": lambda z: (z, np.ones_like(z)),
}


def mlp(depth: int, activation: str = "gelu", residual: bool = True, norm: str | None = "layer") -> Callable[..., Any]:
    """y = x + N(act(x up) ... down) * gain + shift, each product with its bias where the weights have one."""
    names = ["up"] if depth == 1 else ["up", *[f"hidden{i}" for i in range(1, depth - 1)], "down"]
    act = ACTIVATIONS[activation]

    def memory(weights: Weights, x: Array, dy: Array | None = None) -> Any:
        gain = weights.get("norm.weight", np.ones(1))
        inputs, slopes, h = [], [], x
        for place, name in enumerate(names):
            inputs.append(h)
            z = h @ weights[name] + weights.get(f"{name}_bias", np.zeros((1, 1)))[0]
            h, slope = act(z) if place < depth - 1 else (z, np.ones_like(z))
            slopes.append(slope)
        if norm is None:
            unit, scale = h, 1.0
        else:
            centred = h - h.mean() if norm == "layer" else h
            scale = 1 / math.sqrt((centred**2).mean() + 1e-5)
            unit = centred * scale
        if dy is None:
            y = unit * gain + weights.get("norm.bias", np.zeros(1)) if norm is not None else unit
            return x + y if residual else y
        if norm is None:
            delta = dy
        else:
            d = dy * gain
            delta = scale * (d - unit * (unit * d).mean())
            delta = delta - scale * d.mean() if norm == "layer" else delta
        found = {}
        for name, h, slope in zip(reversed(names), reversed(inputs), reversed(slopes), strict=True):
            delta = delta * slope
            found[name] = np.outer(h, delta)
            if f"{name}_bias" in weights:
                found[f"{name}_bias"] = delta[None]
            delta = weights[name] @ delta
        return found

    return memory


# Losses: d loss / d y. --------------------------------------------------------------------------------------------------


def dot(y: Array, v: Array, gates: Gates) -> Array:
    """-<y, v>."""
    return -v


def square(y: Array, v: Array, gates: Gates) -> Array:
    """1/2 ||e||^2."""
    return y - v


def ridge(y: Array, v: Array, gates: Gates) -> Array:
    """c/2 ||y||^2 - <y, v>."""
    return gates["ridge"] * y - v


def power(p: float) -> Callable[..., Array]:
    """1/p sum (e^2 + 1e-6)^(p/2)."""
    return lambda y, v, gates: (y - v) * ((y - v) ** 2 + 1e-6) ** (p / 2 - 1)


def huber(form: str) -> Callable[..., Array]:
    """By coordinate, by norm, or the printed switch."""

    def gradient(y: Array, v: Array, gates: Gates) -> Array:
        e, delta = y - v, gates["delta"]
        if form == "coordinate":
            return np.clip(e, -delta, delta)
        size = np.linalg.norm(e)
        if size <= delta:
            return e
        return delta * e / size if form == "norm" else delta * np.sign(e)

    return gradient


def robust(y: Array, v: Array, gates: Gates) -> Array:
    """1/2 ||e||^2 + Delta ||e||."""
    e = y - v
    return e + gates["Delta"] * e / np.linalg.norm(e)


def longhorn(y: Array, v: Array, gates: Gates) -> Array:
    """The implicit step on 1/2 ||e||^2: e / (1 + eta ||k||^2)."""
    return (y - v) / (1 + gates["smoothing"])


def implicit_huber(y: Array, v: Array, gates: Gates) -> Array:
    """The implicit step on Huber by norm."""
    e, delta, s = y - v, gates["delta"], gates["smoothing"]
    size = np.linalg.norm(e)
    return e / (1 + s) if size / (1 + s) <= delta else delta * e / size


def implicit_robust(y: Array, v: Array, gates: Gates) -> Array:
    """The implicit step on Robust: e loses s Delta of its length, then is divided by 1 + s."""
    e, s = y - v, gates["smoothing"]
    size = np.linalg.norm(e)
    p = max(0.0, 1 - s * gates["Delta"] / size) * e / (1 + s)
    return (e - p) / s


def log_cosh(y: Array, v: Array, gates: Gates) -> Array:
    """sum log cosh e."""
    return np.tanh(y - v)


# Links: A -> W, and kappa(A). -------------------------------------------------------------------------------------------


class Link(NamedTuple):
    """W = link(A), kappa, and what becomes of A at a window end."""

    link: Callable[[Array], Array]
    kappa: Callable[[Array], float]
    settle: Callable[[Array], Array] = lambda a: a


POWER_EPS = 1e-12  # documented: added to sums and means of powers


def _soft(a: Array, threshold: float) -> Array:
    return np.sign(a) * np.maximum(np.abs(a) - threshold, 0)


def identity() -> Link:
    """W = A."""
    return Link(lambda a: a, lambda a: 1.0)


def proximal(threshold: float) -> Link:
    """W = A, soft-thresholded at window ends."""
    return Link(lambda a: a, lambda a: 1.0, lambda a: _soft(a, threshold))


def elastic(threshold: float) -> Link:
    """W = soft(A)."""
    return Link(lambda a: _soft(a, threshold), lambda a: 1.0)


def printed(q: float) -> Link:
    """W = A / ||A||_q^(q-2)."""

    def kappa(a: Array) -> float:
        return float(((np.abs(a) ** q).sum() + POWER_EPS) ** (1 / q)) ** -(q - 2)

    return Link(lambda a: a * kappa(a), kappa)


def rms(q: float, scale: float) -> Link:
    """W = scale A / mean(|A|^q)^((q-2)/q)."""

    def kappa(a: Array) -> float:
        return scale / float((np.abs(a) ** q).mean() + POWER_EPS) ** ((q - 2) / q)

    return Link(lambda a: a * kappa(a), kappa)


def mirror(q: float) -> Link:
    """W = A |A|^(q-2) / ||A||_q^(q-2)."""

    def link(a: Array) -> Array:
        return a * np.abs(a) ** (q - 2) / (((np.abs(a) ** q).sum() + POWER_EPS) ** (1 / q)) ** (q - 2)

    return Link(link, lambda a: float((link(a) * a).sum() / (a * a).sum()))


def softmax(mass: float | None) -> Link:
    """W = mass softmax(A) over the input axis."""

    def link(a: Array) -> Array:
        e = np.exp(a)
        return (len(a) if mass is None else mass) * e / e.sum(0)

    return Link(link, lambda a: (len(a) if mass is None else mass) / len(a), lambda a: a - a.mean(0))


def signed(mass: float | None) -> Link:
    """W = mass sinh(A) / sum cosh(A)."""

    def m(a: Array) -> float:
        return len(a) if mass is None else mass

    return Link(lambda a: m(a) * np.sinh(a) / np.cosh(a).sum(0), lambda a: m(a) / len(a))


def sigmoid() -> Link:
    """W = 1 / (1 + exp(-A))."""
    return Link(lambda a: 1 / (1 + np.exp(-a)), lambda a: 0.25)


def chi2() -> Link:
    """W = the Euclidean projection of A + 1 onto the simplex of mass n, by sorting."""

    def project(column: Array) -> Array:
        n = len(column)
        ordered = np.sort(column + 1)[::-1]
        excess = (ordered.cumsum() - n) / np.arange(1, n + 1)
        last = np.nonzero(ordered > excess)[0][-1]
        return np.maximum(column + 1 - excess[last], 0)

    return Link(lambda a: np.apply_along_axis(project, 0, a), lambda a: 1.0, lambda a: a - a.mean(0))


def hellinger(mass: float) -> Link:
    """W = mass / n (1 - (A - zeta) / 2)^-2, zeta by bisection."""

    def column(a: Array) -> Array:
        low, high = a.max() - 2, a.max()
        for _ in range(60):
            zeta = (low + high) / 2
            if ((1 - (a - zeta) / 2) ** -2).sum() > len(a):
                low = zeta
            else:
                high = zeta
        return mass / len(a) * (1 - (a - zeta) / 2) ** -2

    return Link(lambda a: np.apply_along_axis(column, 0, a), lambda a: mass / len(a), lambda a: a - a.mean(0))


# Learners: z <- step(z, u, alpha, gates) with D first, and settle at window ends. ----------------------------------------


class Learner(NamedTuple):
    """What is kept beside D, and how both move."""

    start: Callable[[Array], list[Array]]
    step: Callable[[list[Array], Array, Array, Gates], list[Array]]
    settle: Callable[[list[Array]], list[Array]] = lambda z: z
    micro_steps: int = 1


def descent(micro_steps: int = 1) -> Learner:
    """D <- alpha D + u."""
    return Learner(lambda d: [d], lambda z, u, alpha, gates: [alpha * z[0] + u], micro_steps=micro_steps)


def momentum() -> Learner:
    """S <- mu S + u, D <- alpha D + S."""

    def step(z: list[Array], u: Array, alpha: Array, gates: Gates) -> list[Array]:
        s = gates["mu"] * z[1] + u
        return [alpha * z[0] + s, s]

    return Learner(lambda d: [d, 0 * d], step)


def omega(window: int) -> Learner:
    """D <- alpha D + the last `window` u."""

    def step(z: list[Array], u: Array, alpha: Array, gates: Gates) -> list[Array]:
        recent = [*z[1:], u][-window:]
        return [alpha * z[0] + sum(recent), *recent]

    return Learner(lambda d: [d], step)


def muon(steps: int) -> Learner:
    """Momentum, but at a window end D takes S with its singular values sent through the quintic."""

    def settle(z: list[Array]) -> list[Array]:
        left, values, right = np.linalg.svd(z[1], full_matrices=False)
        norm = math.sqrt((values**2).sum() + 1e-12)
        x = values / norm
        for _ in range(steps):
            x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
        s = left @ np.diag(x * norm / math.sqrt(min(z[1].shape))) @ right
        return [z[0] - z[1] + s, z[1]]

    return momentum()._replace(settle=settle)


def omega_muon(steps: int, window: int) -> Learner:
    """Muon, its momentum fed the sum of the last `window` u."""

    def step(z: list[Array], u: Array, alpha: Array, gates: Gates) -> list[Array]:
        recent = [*z[2], u][-window:]
        s = gates["mu"] * z[1] + sum(recent)
        return [alpha * z[0] + s, s, recent]

    return Learner(lambda d: [d, 0 * d, []], step, lambda z: [*muon(steps).settle(z[:2]), z[2]])


def averaged() -> Learner:
    """D <- alpha P + c S, where P is D at the window's start and S the window's sum of u, both decaying."""

    def step(z: list[Array], u: Array, alpha: Array, gates: Gates) -> list[Array]:
        begun, total = alpha * z[1], alpha * z[2] + u
        return [begun + gates["token"] * total, begun, total]

    return Learner(lambda d: [d, d, 0 * d], step, lambda z: [z[0], z[0], 0 * z[2]])


# The recurrence. --------------------------------------------------------------------------------------------------------


def along(gate: Array, weight: Array, axis: int) -> Array:
    """A rate or decay, a number or one a channel, against a weight."""
    if np.ndim(gate) == 0:
        return gate
    return gate[:, None] if axis == 0 else gate[None]


def recurrence(
    sequence: dict[str, Any],
    initial: Weights,
    *,
    memory: Callable[..., Any],
    loss: Callable[..., Array],
    link: Link,
    learner: Learner,
    slow: Weights | None = None,
    refresh: int = 1,
    tangent: bool = False,
    decayed: bool = False,
    anchored: bool = True,
    axes: dict[str, int] | None = None,
) -> tuple[Array, Weights]:
    """Outputs [T, V] and the last A.

    `sequence` has q [T, K], k, v, lr [T n, ...], log_decay [T] or [T, C], gates {name: [T n]}. `tangent` is
    link_at="refresh", `decayed` gradient_at="decayed", `anchored` anchor="initial"; `axes` the weights' channel axes.
    """
    slow, axes, n = slow or {}, axes or dict.fromkeys(initial, 0), learner.micro_steps
    a = {name: x if anchored else 0 * x for name, x in initial.items()}
    z = {name: learner.start(initial[name] - a[name]) for name in initial}
    point = {name: z[name][0] for name in initial}
    outputs = []
    for i in range(len(sequence["k"])):
        t, micro = divmod(i, n)
        eta, k = sequence["lr"][i], sequence["k"][i]
        alpha = np.exp(sequence["log_decay"][t]) if micro == 0 else np.float64(1)
        gates = {name: x[i] for name, x in sequence["gates"].items()} | {"smoothing": float((eta * k * k).sum())}
        where = {
            name: link.link(a[name] + (along(alpha, x, axes[name]) * z[name][0] if decayed else x))
            for name, x in point.items()
        }
        error = loss(memory(where | slow, k), sequence["v"][i], gates)
        for name, gradient in memory(where | slow, k, error).items():
            u = -along(eta, gradient, axes[name]) * gradient
            z[name] = learner.step(z[name], u, along(alpha, gradient, axes[name]), gates)
        ends = (i + 1) % refresh == 0
        if ends:
            for name in initial:
                z[name] = learner.settle(z[name])
                z[name][0] = link.settle(a[name] + z[name][0]) - a[name]
                point[name] = z[name][0]
        if micro == n - 1:
            read = {name: link.link(a[name] + z[name][0]) for name in initial}
            if tangent and not ends:
                base = {name: a[name] + point[name] for name in initial}
                read = {
                    name: link.link(base[name]) + link.kappa(base[name]) * (z[name][0] - point[name]) for name in initial
                }
            outputs.append(memory(read | slow, sequence["q"][t]))
    return np.array(outputs), {name: a[name] + z[name][0] for name in initial}
