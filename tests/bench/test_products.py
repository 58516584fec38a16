"""FLOPs derived from a design against those that PyTorch counts while it runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from miras.bench import Case, named_design
from miras.bench.contenders import OURS, PEERS, Attention, Ours
from miras.bench.products import Product, operand_type, products

SIZES: dict[str, Any] = {"batch": 2, "tokens": 35, "heads": 3, "head_dim": 8}


def counted(work: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def case(text: str) -> Case:
    model, *overrides = text.split()
    return Case(text, named_design(model, overrides), **SIZES)


EXACT = [
    "titans_lmm learning.kind=GradientDescent",
    "titans_lmm learning.kind=GradientDescent memory.kind=GatedMLP anchor=origin",
    "titans_lmm learning.kind=GradientDescent memory.kind=MLP memory.depth=3 refresh=100",
    "yaad",
    "yaad refresh=1",
    "moneta",
    "memora link_at=token",
    "moneta link_at=token",
    "ttt_mlp",
    "ttt_linear",
    "gated_deltanet",
    "deltaproduct",
    "longhorn",
    "retnet",
    "linear_attention refresh=16",
    "gla",
]


@pytest.mark.parametrize("mode", ["forward", "decode"])
@pytest.mark.parametrize("text", EXACT)
def test_forward_products_are_those_that_run(text: str, mode: str) -> None:
    assert OURS.flops(case(text), mode) == counted(OURS.work(case(text), mode))


@pytest.mark.parametrize("path", ["recurrent", "substituted"])
def test_of_every_path(path: str) -> None:
    contender, sizes = Ours(path, "", path), case("gated_deltanet")
    assert contender.flops(sizes, "forward") == counted(contender.work(sizes, "forward"))


@pytest.mark.parametrize("text", ["titans_lmm learning.kind=GradientDescent", "yaad", "moneta", "yaad refresh=1"])
def test_backward_products_are_two_for_each(text: str) -> None:
    """Up to the last block's writes, which no output depends on: within 5 % at three blocks, and never below."""
    found, expected = OURS.flops(case(text), "forward+backward"), counted(OURS.work(case(text), "forward+backward"))
    assert found is not None
    assert expected <= found <= 1.05 * expected


def test_momentum_is_short_of_its_masks_only() -> None:
    """Two masks [b, b] are multiplied a block, and with the start column, for each row and head."""
    sizes = case("titans_lmm")
    masks = sum(2 * b**3 + 2 * b**2 for b in (16, 16, 3)) * sizes.batch * sizes.heads
    assert OURS.flops(sizes, "forward") == counted(OURS.work(sizes, "forward")) - masks


@pytest.mark.parametrize("mode", ["forward", "decode"])
def test_the_floor_computes_the_products(mode: str) -> None:
    sizes = case("yaad")
    assert PEERS["floor"].flops(sizes, mode) == counted(PEERS["floor"].work(sizes, mode)) == OURS.flops(sizes, mode)


def test_the_floor_is_in_the_type_that_our_paths_compute_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = {
        device: [operand_type(replace(case("yaad"), device=device, dtype=x)) for x in ("bfloat16", "float32", "float64")]
        for device in ("cuda:0", "cpu")
    }
    assert found["cuda:0"] == [torch.bfloat16, torch.float32, torch.float64]
    assert found["cpu"] == [torch.float32, torch.float32, torch.float64]


def test_the_floor_recomputes_before_a_backward_pass() -> None:
    sizes, floor = case("ttt_mlp"), PEERS["floor"]
    forward, both = OURS.flops(sizes, "forward"), OURS.flops(sizes, "forward+backward")
    assert forward is not None and both is not None
    assert floor.flops(sizes, "forward+backward") == counted(floor.work(sizes, "forward+backward")) == forward + both


def test_attention_by_blocks_is_a_little_more_than_its_triangle() -> None:
    sizes = Case("transformer", named_design("transformer"), 1, 1000, 2, 8)
    blocks, triangle = (x.flops(sizes, "forward") for x in (OURS, Attention("sdpa", "")))
    assert blocks is not None and triangle is not None
    assert triangle < blocks < 1.15 * triangle
    window = Case("swa", named_design("swa", ["window=5"]), 1, 1000, 2, 8)
    assert max(p.n for p in products(window, "forward")) == 132


def test_a_product() -> None:
    a, b = torch.ones(3, 4, 5), torch.ones(3, 5, 6)
    assert Product(3, 4, 5, 6).flops == counted(lambda: torch.bmm(a, b))
