"""FLOPs of a training step, as torch's operations compute them."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from miras.kernels.fused import compiled_from
from miras.tasks import Task

aten: Any = torch.ops.aten


def count_flops(model: nn.Module, task: Task) -> float:
    """FLOPs a token of the matrix products of one training step, counted on one example.

    The whole squares of attentions and of triangular systems count, as they would multiplied out. What a path recomputes or
    a program of ours leaves out does not show: everything runs as torch's own operations.
    """
    batch = task.sample(1, np.random.default_rng(0))
    with compiled_from(sys.maxsize), FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        task.loss(model(batch.inputs), batch.targets).backward()
    model.zero_grad()
    return counter.get_total_flops() / batch.inputs.shape[1]


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """Every query with every key and value, two FLOPs a multiply-add."""
    return 2 * query[:-1].numel() * key[-2] * (query[-1] + value[-1])


def _attention_backward(_: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *__: Any, **___: Any) -> int:
    """Two products for each one forward; those that are made again do not count."""
    return 2 * _attention(query, key, value)


def _solve(matrix: torch.Size, right: torch.Size, *_: Any, **__: Any) -> int:
    """A triangular system as the product with its inverse."""
    return 2 * right.numel() * matrix[-1]


UNCOUNTED = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten.linalg_solve_triangular: _solve,
}
"""Operations that torch's counter passes over."""
