"""Sequences laid end to end in one row, so that padding is never computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from miras.choice import require


@dataclass(frozen=True)
class Packing:
    """Where each of R sequences lies in a packed row [1, N, ...], and in the padded batch [B, T, ...] it came from.

    bounds   [R + 1] int64 on the CPU: sequence r is tokens bounds[r] to bounds[r + 1]
    tokens   [N] index of each token in the flattened padded batch (None: there is no padded batch)
    rows     [R] batch row of each sequence (None: sequence r is row r, and no row is empty)
    shape    (B, T) of the padded batch; without one (R, longest sequence)
    """

    bounds: Tensor
    tokens: Tensor | None
    rows: Tensor | None
    shape: tuple[int, int]
    _shifted: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_mask(cls, mask: Tensor, num_rows: int, num_tokens: int) -> Packing | None:
        """The packing of a padded batch, or None where nothing is padded.

        `mask` [B, S] is 1 at real tokens; its last `num_tokens` columns are the batch's, the earlier ones belong to
        tokens that a cache already holds.
        """
        require(
            mask.dim() == 2 and mask.shape[0] == num_rows and mask.shape[1] >= num_tokens,
            f"attention_mask has shape {tuple(mask.shape)}; must be [{num_rows}, {num_tokens}] (1 at real tokens, 0 at "
            "padding), with earlier columns in front of it when a cache is given",
        )
        mask = mask[:, mask.shape[1] - num_tokens :].bool()
        lengths = mask.sum(1).cpu()
        if bool((lengths == num_tokens).all()):
            return None
        require(int(lengths.sum()) > 0, "attention_mask hides every token; give at least one real one")
        rows = lengths.nonzero().squeeze(1)
        return cls(
            bounds=_bounds(lengths[rows]),
            tokens=mask.flatten().nonzero().squeeze(1),
            rows=None if len(rows) == num_rows else rows,
            shape=(num_rows, num_tokens),
        )

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, num_rows: int, num_tokens: int) -> Packing:
        """The packing that `cu_seqlens` = [0, end of first, ..., N] describes, for a batch of one row of N tokens."""
        require(num_rows == 1, f"cu_seqlens packs sequences into one row: the batch must be 1, got {num_rows}")
        require(
            cu_seqlens.dim() == 1 and len(cu_seqlens) >= 2 and not cu_seqlens.is_floating_point(),
            "cu_seqlens must be a one-dimensional integer tensor [0, end of first, ..., T]",
        )
        bounds = cu_seqlens.detach().cpu().long()
        lengths = bounds.diff()
        require(
            int(bounds[0]) == 0 and int(bounds[-1]) == num_tokens and bool((lengths > 0).all()),
            f"cu_seqlens={bounds.tolist()}; must start at 0, rise strictly (no empty sequence) and end at {num_tokens}",
        )
        return cls(bounds, None, None, (len(lengths), int(lengths.max())))

    @property
    def num_sequences(self) -> int:
        return len(self.bounds) - 1

    @cached_property
    def sequence(self) -> Tensor:
        """[N] on the CPU: the sequence of each token."""
        return torch.repeat_interleave(torch.arange(self.num_sequences), self.bounds.diff())

    @cached_property
    def position(self) -> Tensor:
        """[N] on the CPU: each token's position in its sequence."""
        return torch.arange(int(self.bounds[-1])) - self.bounds[self.sequence]

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [1, N, ...]."""
        assert self.tokens is not None
        return x.flatten(0, 1).index_select(0, self.tokens).unsqueeze(0)

    def pad(self, x: Tensor) -> Tensor:
        """[1, N, ...] -> [B, T, ...], zero at padding; as it is where there is no padded batch."""
        if self.tokens is None:
            return x
        flat = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[2:])
        return flat.index_copy(0, self.tokens, x.squeeze(0)).unflatten(0, self.shape)

    def spread(self, gap: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Places in the row that has `gap` more slots in front of every sequence.

        Returns those of the tokens [N], of the slots [R * gap], and of each sequence's last `gap` entries [R * gap].
        """
        if gap not in self._shifted:
            slots = torch.arange(gap) + gap * torch.arange(self.num_sequences).unsqueeze(1)
            tokens = torch.arange(len(self.sequence)) + gap * (self.sequence + 1)
            front = slots + self.bounds[:-1].unsqueeze(1)
            back = slots + self.bounds[1:].unsqueeze(1)
            self._shifted[gap] = (tokens.to(device), front.flatten().to(device), back.flatten().to(device))
        return self._shifted[gap]


def _bounds(lengths: Tensor) -> Tensor:
    return torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
