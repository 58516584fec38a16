"""Memory that passes use one after another."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from miras.bench.measure import _release
from miras.kernels import space


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(space, "LEAST", 64)
    space.forget()
    yield
    space.forget()


LIKE = torch.zeros((), dtype=torch.float64)


def test_memory_is_used_again_when_nothing_refers_to_it() -> None:
    first = space.empty(LIKE, (4, 5))
    assert first.shape == (4, 5) and first.dtype == torch.float64 and first.is_contiguous()
    place, row = first.data_ptr(), first[1]
    row.fill_(3.0)
    del first
    second = space.empty(LIKE, (4, 5)).fill_(1.0)
    assert second.data_ptr() != place and row.eq(3.0).all()
    del row
    third = space.empty(LIKE, (3, 5))
    assert third.data_ptr() == place


def test_memory_that_does_not_fit_is_given_back() -> None:
    del_me = space.empty(LIKE, (20,))
    del del_me
    assert [len(x) for x in space._free] == [160]
    larger = space.empty(LIKE, (21,))
    assert space._free == []
    del larger
    smaller = space.empty(LIKE, (10,))
    assert space._free == [] and smaller.shape == (10,)


def test_peak_memory_counts_what_was_kept() -> None:
    x = space.empty(LIKE, (8,))
    del x
    assert space._free
    _release()
    assert space._free == []


def test_memory_of_less_is_not_kept() -> None:
    x = space.empty(LIKE, (7,))
    del x
    assert space._free == []
