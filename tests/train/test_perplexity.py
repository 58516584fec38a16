"""Perplexity against sums by hand."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from miras.evals.perplexity import IGNORED, score
from miras.train.rows import Windows, stack
from tests.train.test_data import STARTS, tokens


class Bigram(nn.Module):
    """Logits that depend on the last token only, so that rows and windows cannot change a score."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(24, 24))

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        assert not self.training
        assert not use_cache
        return SimpleNamespace(logits=self.table[input_ids])


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("block_size", [2, 7, 64])
@pytest.mark.parametrize("isolate", [False, True])
def test_score_is_the_sum_over_every_predicted_token(batch_size: int, block_size: int, isolate: bool) -> None:
    model, ids = Bigram(), torch.from_numpy(tokens().ids)
    log_p = model.table.log_softmax(-1)
    nats = -sum(log_p[ids[i - 1], ids[i]].item() for i in range(1, 23) if not (isolate and i in STARTS))
    count = 23 - (len(STARTS) if isolate else 1)
    windows = Windows(tokens(), block_size, isolate)
    found = score(model, DataLoader(windows, batch_size, collate_fn=stack), windows.bytes_per_token)
    assert found.tokens == count
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert found.loss == pytest.approx(nats / count, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nats / count), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / 100, rel=1e-5)
    assert model.training


def test_ignored_labels_do_not_count() -> None:
    labels = torch.tensor([[1, 2, IGNORED, 4]])
    found = score(Bigram(), [{"input_ids": torch.tensor([[1, 2, 3, 4]]), "labels": labels}], 1.0)
    assert found.tokens == 2
    assert set(found.to_dict()) == {"nats", "tokens", "text_bytes", "loss", "perplexity", "bits_per_byte"}
