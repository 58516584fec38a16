"""Rows of tokens: how a tokenised split is cut for training and for evaluation, and put into batches."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset

IGNORED = -100  # the label that Hugging Face losses skip


class Tokens:
    """A tokenised split: all documents in one row of ids, each document beginning with the separator.

    ids [N] (memory-mapped), starts [D] the index of each document's separator, text_bytes the UTF-8 bytes of all
    the texts, which turns nats a token into bits a byte.
    """

    def __init__(self, ids: np.ndarray, starts: np.ndarray, text_bytes: int, names: tuple[str, ...] = ()) -> None:
        self.ids, self.starts, self.text_bytes, self.names = ids, starts, text_bytes, names

    def __len__(self) -> int:
        return len(self.ids)


class Blocks(Dataset[dict[str, torch.Tensor]]):
    """Training rows: ids cut every `block_size` tokens; the last, shorter row is padded. No token is lost or repeated.

    Each item has input_ids [T], labels [T] (IGNORED at padding, and at separators if documents are isolated: the
    model shifts labels, so that is where one document would predict the next) and starts [T] (1 where a document
    begins). Padding stands at the end, where a causal model cannot let it reach a real token.
    """

    def __init__(self, tokens: Tokens, block_size: int, isolate_documents: bool = False, separator: int = 0) -> None:
        self.tokens, self.block_size, self.isolate, self.separator = (
            tokens,
            block_size,
            isolate_documents,
            separator,
        )

    def __len__(self) -> int:
        return -(-len(self.tokens) // self.block_size)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        begin = index * self.block_size
        end = min(begin + self.block_size, len(self.tokens))
        first, last = np.searchsorted(self.tokens.starts, [begin, end])
        borders = np.asarray(self.tokens.starts[first:last]) - begin
        return row(np.asarray(self.tokens.ids[begin:end]), borders, self.block_size, self.isolate, self.separator)


class Windows(Dataset[dict[str, torch.Tensor]]):
    """Evaluation rows: every token after a text's first is predicted exactly once, with up to block_size - 1 before it.

    Rows overlap by one token (the context of the next row's first prediction). With `isolate_documents` no row
    crosses a document's border. `limit` keeps about that many predictions, in rows spread evenly over the split.
    bytes_per_token is the split's: UTF-8 bytes of text for each prediction.
    """

    def __init__(
        self,
        tokens: Tokens,
        block_size: int,
        isolate_documents: bool = False,
        separator: int = 0,
        limit: int | None = None,
    ) -> None:
        self.tokens, self.block_size, self.separator = tokens, block_size, separator
        begins = list(map(int, tokens.starts)) if isolate_documents else [0]
        self.bytes_per_token = tokens.text_bytes / max(1, len(tokens) - len(begins))
        spans: list[tuple[int, int]] = []
        for begin, end in zip(begins, [*begins[1:], len(tokens)], strict=True):
            spans += [(at, min(at + block_size, end)) for at in range(begin, end - 1, block_size - 1)]
        if limit is not None and len(spans) * (block_size - 1) > limit:
            count = max(1, limit // (block_size - 1))
            spans = [spans[i * len(spans) // count] for i in range(count)]
        self.spans = spans

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        begin, end = self.spans[index]
        return row(
            np.asarray(self.tokens.ids[begin:end]),
            np.zeros(0, np.int64),
            self.block_size,
            False,
            self.separator,
        )


def row(ids: np.ndarray, borders: np.ndarray, size: int, isolate: bool, separator: int) -> dict[str, torch.Tensor]:
    """One row as tensors [size]: input_ids, labels and starts; `borders` are the indices where documents begin."""
    input_ids = torch.full((size,), separator, dtype=torch.long)
    input_ids[: len(ids)] = torch.from_numpy(ids.astype(np.int64))
    labels = torch.full((size,), IGNORED, dtype=torch.long)
    labels[: len(ids)] = input_ids[: len(ids)]
    starts = torch.zeros(size, dtype=torch.long)
    starts[torch.from_numpy(borders.astype(np.int64))] = 1
    if isolate:
        labels[starts.bool()] = IGNORED
    return {"input_ids": input_ids, "labels": labels, "starts": starts}


def stack(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows as a batch: input_ids and labels [B, T]; documents run on into one another."""
    return {key: torch.stack([r[key] for r in rows]) for key in ("input_ids", "labels")}


def flatten(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows as one packed row [1, B T] with cu_seqlens [S + 1]: the memory starts afresh at rows and documents."""
    input_ids, labels, starts = (torch.cat([r[key] for r in rows]) for key in ("input_ids", "labels", "starts"))
    width = len(rows[0]["input_ids"])
    starts[::width] = 1
    labels = torch.where(starts.bool(), IGNORED, labels)
    ends = torch.tensor([len(input_ids)])
    return {
        "input_ids": input_ids[None],
        "labels": labels[None],
        "cu_seqlens": torch.cat([starts.nonzero()[:, 0], ends]).to(torch.int32),
    }
