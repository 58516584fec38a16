"""The non-parametric memory: causal softmax attention, whole or over a sliding window, with persistent tokens."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from miras.engine.problem import AttentionState


def run_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, state: AttentionState | None, weights: Mapping[str, Tensor]
) -> tuple[Tensor, AttentionState]:
    """Outputs [B, T, H, V] for q, k [B, T, H, K], v [B, T, H, V] after the past in `state`; rows may differ in length.

    `weights` may hold the "keys" and "values" [H, N, D] of N persistent tokens, which every query sees.
    """
    batch, num_tokens = q.shape[:2]
    length = torch.zeros(batch, dtype=torch.int64) if state is None else state.length
    if state is not None:
        k, v = torch.cat((state.keys.to(k.dtype), k), dim=1), torch.cat((state.values.to(v.dtype), v), dim=1)
    past = k.shape[1] - num_tokens
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    if weights:
        key, value = (_prefixed(weights[name], x) for name, x in (("keys", key), ("values", value)))
    if past == 0 and (window is None or window >= num_tokens) and not weights:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    else:
        mask = _visible(num_tokens, past, window, length.to(q.device))
        mask = F.pad(mask, (key.shape[2] - mask.shape[3], 0), value=True)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    keep = k.shape[1] if window is None else min(k.shape[1], window - 1)
    start = k.shape[1] - keep
    # Copies: a view would keep every key and value of a long prompt alive behind a short window.
    keys, values = (x[:, start:].clone() if start > 0 else x for x in (k, v))
    return out.transpose(1, 2), AttentionState(keys, values, (length + num_tokens).clamp_max(keep))


def _prefixed(prefix: Tensor, x: Tensor) -> Tensor:
    """[H, N, D] in front of x [B, H, S, D]."""
    return torch.cat((prefix.to(x.dtype).expand(x.shape[0], -1, -1, -1), x), dim=2)


def _visible(num_tokens: int, past: int, window: int | None, length: Tensor) -> Tensor:
    """Which of past + num_tokens keys each query sees, [B, 1, T, S]: real ones, not later, inside the window."""
    key = torch.arange(past + num_tokens, device=length.device)
    query = key[past:, None]
    seen = key <= query
    if window is not None:
        seen = seen & (key > query - window)
    real = key >= past - length[:, None]
    return seen & real[:, None, None, :]


def run_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    state: AttentionState | None,
    weights: Mapping[str, Tensor],
    cu_seqlens: Tensor,
) -> tuple[Tensor, AttentionState]:
    """The same for sequences packed into one row, one after the other; the state has a row for each."""
    bounds = cu_seqlens.tolist()
    outputs, ends = [], []
    for row, (start, stop) in enumerate(pairwise(bounds)):
        past = None if state is None else state.index_select(torch.tensor([row]))
        out, end = run_attention(q[:, start:stop], k[:, start:stop], v[:, start:stop], window, past, weights)
        outputs.append(out)
        ends.append(end)
    longest = max(end.keys.shape[1] for end in ends)

    def right(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, longest - x.shape[1], 0))

    final = AttentionState(
        torch.cat([right(end.keys) for end in ends]),
        torch.cat([right(end.values) for end in ends]),
        torch.cat([end.length for end in ends]),
    )
    return torch.cat(outputs, dim=1), final
