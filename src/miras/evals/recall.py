"""A training loop for multi-query associative recall (`miras.tasks.MQAR`), and what it gave."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miras.tasks import IGNORED, MQAR


@dataclass(frozen=True)
class Recipe:
    """How a model is trained on recall: AdamW, linear warm-up, cosine to a tenth."""

    steps: int = 400
    batch_size: int = 32
    lr: float = 3e-3
    warmup: int = 40
    weight_decay: float = 0.1
    clip: float = 1.0
    num_test: int = 512
    seed: int = 0


@dataclass
class Result:
    """What a run gave: accuracy over all test queries, loss and gradient norm along the way, seconds."""

    accuracy: float
    losses: list[float] = field(default_factory=list[float])
    largest_gradient: float = 0.0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def accuracy(model: nn.Module, inputs: Tensor, targets: Tensor, batch_size: int = 64) -> float:
    """Share of queries answered right."""
    right = asked = 0
    model.eval()
    with torch.no_grad():
        for x, y in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
            ask = y != IGNORED
            right += int((model(input_ids=x).logits.argmax(-1)[ask] == y[ask]).sum())
            asked += int(ask.sum())
    return right / asked


def solve(model: nn.Module, task: MQAR, recipe: Recipe) -> Result:
    """Train `model` (a causal LM) on fresh samples of the task and test it on samples of another seed.

    Raises:
        FloatingPointError: the loss or the gradient is not finite.
    """
    rng = np.random.default_rng([recipe.seed, 0])
    plain = [p for p in model.parameters() if p.dim() < 2 or getattr(p, "_no_weight_decay", False)]
    chosen = {id(p) for p in plain}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in chosen], "weight_decay": recipe.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _scale(step, recipe))
    result, start = Result(0.0), time.perf_counter()
    model.train()
    for step in range(recipe.steps):
        x, y = task.sample(recipe.batch_size, rng)
        ask = y != IGNORED
        loss = F.cross_entropy(model(input_ids=x).logits[ask], y[ask])
        optimizer.zero_grad()
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), recipe.clip))
        if not np.isfinite(norm) or not np.isfinite(loss.item()):
            raise FloatingPointError(f"step {step}: loss {loss.item():g}, gradient norm {norm:g}")
        optimizer.step()
        schedule.step()
        result.losses.append(loss.item())
        result.largest_gradient = max(result.largest_gradient, norm)
    result.seconds = time.perf_counter() - start
    result.accuracy = accuracy(model, *task.sample(recipe.num_test, np.random.default_rng([recipe.seed, 1])))
    return result


def _scale(step: int, recipe: Recipe) -> float:
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return 0.1 + 0.45 * (1 + np.cos(np.pi * done))
