"""One-shot recall of an untrained memory: how well does one pass of writes bind random keys to random values?

    python benchmarks/one_shot.py > docs/results/one_shot.md

12 pairs of random unit keys and values (width 32) with 12 distractors in between are written once, then 32 copies of one
filler pair; the memory is read at the 12 keys. Score: the share of read-outs (mean taken out) that are nearest, by angle,
to their own value among the 12; chance is 0.083. Mean over 16 sequences and 2 heads, seed 0. A setting that cannot do this
before training has to be trained out of it; scores near the linear memory's are as good as one pass can be.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import miras
from miras.bias import L2, Bias, Huber, Lp
from miras.design import Design
from miras.learning import GradientDescent
from miras.memory import MLP, Matrix, Memory
from miras.retention import KL, Lq, LqMirror, LqRms, Retention, SignedKL
from miras.retention import L2 as Decay

ROWS, PAIRS, FILL, HEADS, WIDTH = 16, 12, 32, 2, 32


def unit(*shape: int) -> Tensor:
    """Random unit vectors."""
    return F.normalize(torch.randn(*shape, HEADS, WIDTH), dim=-1)


def score(
    memory: Memory, bias: Bias, retention: Retention, rate: float, std: float, gain: float, refresh: int = 16
) -> float:
    """Share of right answers; std and gain in the units of `Inputs.weight_std` and `Inputs.norm_gain`."""
    torch.manual_seed(0)
    keys, values = unit(ROWS, PAIRS), unit(ROWS, PAIRS)
    noise_k, noise_v = unit(ROWS, PAIRS), unit(ROWS, PAIRS)
    fill_k, fill_v = (unit(1, 1).expand(ROWS, FILL, -1, -1) for _ in range(2))
    k = torch.cat((torch.stack((keys, noise_k), 2).flatten(1, 2), fill_k, keys), 1)
    v = torch.cat((torch.stack((values, noise_v), 2).flatten(1, 2), fill_v, torch.zeros_like(values)), 1)
    lr = torch.full(k.shape[:3], rate)
    lr[:, -PAIRS:] = 0
    design = Design(memory, bias, retention, GradientDescent(), refresh=refresh, link_at="refresh")
    scale = 1.0 if retention.logits else WIDTH**-0.5
    drawn = {n: std * scale * torch.randn(HEADS, s.d_in, s.d_out) for n, s in memory.weights(WIDTH, WIDTH).items()}
    weights = drawn if retention.logits or std == 0 else {n: retention.unlink(x) for n, x in drawn.items()}
    if memory.slow(WIDTH):
        weights["norm.weight"] = torch.full((HEADS, WIDTH), gain * WIDTH**-0.5)
    gates = {gate.name: torch.full(k.shape[:3], gate.initial) for gate in design.gates}
    with torch.no_grad():
        out, _ = miras.memorize(k, k, v, design=design, weights=weights, lr=lr, gates=gates)
    read = out[:, -PAIRS:] - (keys if isinstance(memory, MLP) else 0)
    read = F.normalize(read - read.mean(1, keepdim=True), dim=-1)
    nearest = torch.einsum("bphd,bjhd->bhpj", read, values).argmax(-1)
    return float((nearest == torch.arange(PAIRS)).float().mean())


def main() -> None:
    rates = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
    huber = Huber("coordinate")
    cases: list[tuple[str, Memory, Bias, Retention, float, float, int]] = [
        ("matrix, L2, exact online", Matrix(), L2(), Decay(), 0.0, 0.0, 1),
        ("matrix, L2, refresh 16", Matrix(), L2(), Decay(), 0.0, 0.0, 16),
        ("MLP, L2, exact online", MLP(), L2(), Decay(), 1.7, 1.4, 1),
        ("MLP, L2", MLP(), L2(), Decay(), 1.7, 1.4, 16),
        ("MLP, L2, norm_gain 5.7 (gain 1)", MLP(), L2(), Decay(), 1.7, 5.7, 16),
        ("MLP, L2, weight_std 5.7 (std 1)", MLP(), L2(), Decay(), 5.7, 1.4, 16),
        ("MLP, L2, weight_std 0.6", MLP(), L2(), Decay(), 0.6, 1.4, 16),
        ("MLP, Huber coordinate (Yaad)", MLP(), huber, Decay(), 1.7, 1.4, 16),
        ("MLP, Huber norm", MLP(), Huber("norm"), Decay(), 1.7, 1.4, 16),
        ("MLP, Huber switch, as printed", MLP(), Huber("switch"), Decay(), 1.7, 1.4, 16),
        ("MLP, Lp(3)", MLP(), Lp(3.0), Decay(), 1.7, 1.4, 16),
        ("MLP, Lp(3), LqRms(4, 0.3) (Moneta)", MLP(), Lp(3.0), LqRms(4.0, 0.3), 1.7, 1.4, 16),
        ("MLP, Lp(3), Lq(4), as printed", MLP(), Lp(3.0), Lq(4.0), 1.7, 1.4, 16),
        ("MLP, Lp(3), LqMirror(4)", MLP(), Lp(3.0), LqMirror(4.0), 1.7, 1.4, 16),
        ("MLP, L2, SignedKL (Memora)", MLP(), L2(), SignedKL(), 1.7, 1.4, 16),
        ("MLP, L2, KL, as printed, logits std 2", MLP(), L2(), KL(), 2.0, 1.4, 16),
    ]
    print("# One-shot recall of untrained memories\n")
    print(f"```\n{(__doc__ or '').strip()}\n```\n")
    print(
        "Columns: the rate eta. Unless said otherwise weight_std 1.7, norm_gain 1.4, refresh 16, delta 1, link at refresh.\n"
    )
    print("| design | " + " | ".join(f"{rate:g}" for rate in rates) + " |")
    print("|---|" + "---|" * len(rates))
    for name, memory, bias, retention, std, gain, refresh in cases:
        cells = [score(memory, bias, retention, rate, std, gain, refresh) for rate in rates]
        print(f"| {name} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
