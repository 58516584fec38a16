"""A document in blocks gives what one forward pass gives, in memory that does not grow."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import miras
from miras.evals.perplexity import score_whole
from miras.lm import MirasCache, MirasConfig, MirasForCausalLM
from miras.train.rows import Tokens

T = 41

NAMES = ["yaad", "yaad_h", "titans_mac", "titans_mag", "titans_mal", "ttt_mlp", "gated_deltanet", "rwkv7", "atlas", "swa"]


def build(name: str, **overrides: Any) -> MirasForCausalLM:
    torch.manual_seed(0)
    design = miras.models.named(name, **overrides)
    sizes = {"vocab_size": 23, "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 2, "initializer_range": 0.3}
    return MirasForCausalLM(MirasConfig(design=design, **sizes)).double().eval()  # type: ignore[arg-type]


def document(*shape: int) -> Tensor:
    return torch.randint(0, 23, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def at_once(model: MirasForCausalLM, ids: Tensor) -> Tensor:
    logits = model(ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


@pytest.mark.parametrize("block", [1, 7, 16, 1000])
@pytest.mark.parametrize("name", NAMES)
def test_blocks_give_what_one_pass_gives(name: str, block: int) -> None:
    windows = {"window": 5} if name in ("yaad_h", "titans_mag", "titans_mal", "swa") else {}
    model, ids = build(name, **windows), document(2, T)
    parts = list(miras.stream(model, ids, block))
    assert len(parts) == -(-T // block) - (block == 1)
    torch.testing.assert_close(torch.cat(parts, 1), at_once(model, ids), atol=1e-9, rtol=1e-9)


def test_one_document_as_a_row_an_array_or_half_the_bytes(tmp_path: Any) -> None:
    model, ids = build("yaad"), document(T)
    expected = at_once(model, ids[None])[0]
    file = tmp_path / "ids.bin"
    ids.numpy().astype(np.uint16).tofile(file)
    for given in (ids, ids.int(), ids.numpy(), np.memmap(file, np.uint16, "r")):
        losses = torch.cat(list(miras.stream(model, given, 10)))
        torch.testing.assert_close(losses, expected, atol=1e-9, rtol=1e-9)


def test_a_cache_that_has_seen_what_stands_before() -> None:
    model, ids, cache = build("yaad_h", window=5), document(1, T), MirasCache()
    first = list(miras.stream(model, ids[:, :20], 8, cache))
    rest = list(miras.stream(model, ids[:, 20:], 8, cache))
    assert cache.get_seq_length() == T
    found, expected = torch.cat([*first, *rest], 1), at_once(model, ids)
    # The first token after the break is context only.
    torch.testing.assert_close(found, torch.cat((expected[:, :19], expected[:, 20:]), 1), atol=1e-9, rtol=1e-9)


def test_the_caller_s_mode_and_graph_are_left_alone() -> None:
    model = build("yaad").train()
    for losses in miras.stream(model, document(T), 8):
        assert model.training
        assert torch.is_grad_enabled()
        assert not losses.requires_grad


def test_one_token_has_no_loss() -> None:
    assert list(miras.stream(build("yaad"), document(1))) == []


@pytest.mark.parametrize(
    ("ids", "block", "message"),
    [
        (document(0), 4, r"ids are \(0,\)"),
        (document(1, 2, 3), 4, r"ids are \(1, 2, 3\)"),
        (document(4), 0, "block=0"),
    ],
)
def test_what_is_refused(ids: Tensor, block: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        miras.stream(build("yaad"), ids, block)


def test_score_of_a_whole_text() -> None:
    model, ids = build("yaad"), document(T)
    found = score_whole(model, Tokens(ids.numpy().astype(np.uint16), np.zeros(1, np.int64), 100), block=6)
    assert found.tokens == T - 1
    assert found.nats == pytest.approx(at_once(model, ids[None]).sum().item(), rel=1e-12)
    assert found.text_bytes == 100


@pytest.mark.parametrize("name", ["yaad", "yaad_h", "titans_mac", "titans_mal", "gated_deltanet"])
def test_the_states_do_not_grow(name: str) -> None:
    """Measured at segments' and windows' ends, where the states of every design are as large as they get or emptied."""
    windows = {"window": 16} if name in ("yaad_h", "titans_mal") else {}
    model, cache = build(name, **windows), MirasCache()
    sizes = [cache.nbytes for _ in miras.stream(model, document(1, 640), 64, cache)]
    assert len(sizes) == 10
    assert len(set(sizes)) == 1


RUN = """
import sys, torch, miras
from miras.train.callbacks import peak_memory, reset_peak_memory

torch.set_num_threads(1)
design = miras.models.named("yaad_h", window=64)
config = miras.MirasConfig(design=design, vocab_size=256, hidden_size=64, num_hidden_layers=2, num_heads=2)
model = miras.MirasForCausalLM(config)
ids = torch.randint(0, 256, (51 * 256,))
for index, losses in enumerate(miras.stream(model, ids, 256)):
    if index == 5:
        reset_peak_memory()
        print(peak_memory(use_cpu=True))
print(peak_memory(use_cpu=True))
"""


@pytest.mark.slow
def test_memory_is_flat_over_fifty_blocks() -> None:
    """Resident memory after 6 blocks against its peak over 45 more: within 8 MB.

    The working memory of one block comes and goes within them; a graph that was kept would cost that much a block.
    """
    shown = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, check=True).stdout.split()
    start, peak = map(int, shown)
    assert peak - start < 8e6
