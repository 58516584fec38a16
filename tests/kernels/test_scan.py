"""What surrounds the programs of a scan: states of other types, hooks on what is saved, what is not learned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import miras
from miras.kernels import native
from miras.kernels.native import NativePrograms
from tests.kernels.scan_cases import PLAIN, Sorted
from tests.problems import differentiable, leaves, probe, random_problem, run, sliced, with_leaves


@pytest.fixture
def built_anew() -> Iterator[None]:
    native.forget()
    yield
    native.forget()


def test_a_state_of_another_type() -> None:
    """One of less precision is taken as it is; one of more would lose digits."""
    problem = random_problem(PLAIN, tokens=32)
    first, second = sliced(problem, 0, 16), sliced(problem, 16, 32)
    _, state = run(first, path="frozen")
    for dtype in (torch.float32, torch.bfloat16):
        given = state.map(lambda x, dtype=dtype: x.to(dtype) if x.is_floating_point() else x)
        expected = run(second, path="reference", initial_state=given)[0]
        torch.testing.assert_close(run(second, path="native", initial_state=given)[0], expected, rtol=0, atol=1e-9)
    single = with_leaves(second, {name: x.float() for name, x in leaves(second).items()})
    with pytest.raises(TypeError, match=r"initial_state is in float64, and a call with k in torch.float32"):
        run(single, path="native", initial_state=state)


@pytest.mark.parametrize(("path", "refresh"), [("native", 5), ("fused", 5), ("fused", 1)])
@pytest.mark.usefixtures("built_anew")
def test_gradient_checkpointing(path: str, refresh: int) -> None:
    """With programs that are made meanwhile, and with those that are there."""
    problem = random_problem(replace(PLAIN, refresh=refresh), tokens=20, width=6)
    plain, expected = differentiable(problem)
    probe(run(plain, path="reference")[0]).backward()
    for _ in range(2):
        tracked, found = differentiable(problem)
        out = checkpoint(lambda *_, tracked=tracked: run(tracked, path=path)[0], *found.values(), use_reentrant=False)
        probe(out).backward()
        for name, leaf in found.items():
            torch.testing.assert_close(leaf.grad, expected[name].grad, rtol=0, atol=1e-9)


def test_nothing_is_kept_where_nothing_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the weights need a gradient elsewhere."""
    made: list[object] = []
    monkeypatch.setattr(NativePrograms, "make", lambda self, block, needed: made.append(needed))
    tracked, _ = differentiable(random_problem(PLAIN, tokens=32))
    with torch.no_grad():
        run(tracked, path="native")
    assert made == [None]
    run(tracked, path="native")
    assert made[1:] == [(True,) * 7, None]


@pytest.mark.usefixtures("built_anew")
def test_what_cannot_be_made_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[object] = []
    traced = native.traced
    monkeypatch.setattr(native, "traced", lambda *given: tried.append(given) or traced(*given))
    problem = random_problem(replace(PLAIN, bias=Sorted()), tokens=16)
    for _ in range(2):
        with pytest.raises(ValueError, match="path='native' cannot run"):
            run(problem, path="native")
    assert len(tried) == 1


def test_tensors_on_several_devices() -> None:
    problem = random_problem(PLAIN, tokens=4)
    with pytest.raises(ValueError, match=r"tensors lie on several devices: .*'lr': 'meta'.*; move them to one"):
        miras.memorize(**{**problem, "lr": problem["lr"].to("meta")})
