"""The triton path against the reference: on a GPU by `make test-gpu`, in Triton's interpreter by `test_triton.py`.

Not collected by itself, since the interpreter has to be chosen before anything in the process imports Triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from miras import learning, memory
from miras.design import Design
from miras.kernels import triton
from tests.kernels.scan_cases import PLAIN, Scans, Sorted, home
from tests.problems import assert_same, outcome, run

INTERPRETED = triton.interpreted()


@pytest.fixture
def own_programs() -> Iterator[None]:
    """Programs made in a test alone."""
    for make in (triton.forward_program, triton.backward_program):
        make.cache_clear()
    yield
    for make in (triton.forward_program, triton.backward_program):
        make.cache_clear()


class TestTriton(Scans):
    path = "triton"
    device = "cpu" if INTERPRETED else "cuda"
    dtype, tolerance = (torch.float64, 1e-9) if INTERPRETED else (torch.float32, 2e-4)

    @pytest.mark.parametrize("rule", [learning.GradientDescent(), learning.Momentum()], ids=lambda x: x.kind)
    @pytest.mark.usefixtures("own_programs")
    def test_quick_weights_read_anew(self, rule: learning.Learning, monkeypatch: pytest.MonkeyPatch) -> None:
        """As large memories do, whose weights and gradients stay out of registers (an odd and an even number of blocks)."""
        monkeypatch.setattr(triton, "REREAD", 0)
        self.assert_same_as_reference(replace(PLAIN, learning=rule), tokens=48 if rule.slots == 1 else 32)

    @pytest.mark.parametrize("kept", ["registers", "memory"])
    @pytest.mark.usefixtures("own_programs")
    def test_quick_in_pieces(self, kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """As wide memories are, whose matrices are several tiles; the last window is left in single steps."""
        monkeypatch.setattr(triton, "PIECE", 16)
        monkeypatch.setattr(triton, "REREAD", 0 if kept == "memory" else triton.REREAD)
        self.assert_same_as_reference(PLAIN, tokens=40)

    def test_shapes_of_usual_size(self) -> None:
        """A head of 64 channels and its hidden layer of 256, which is two tiles; its weights stay in memory."""
        design = replace(PLAIN, memory=memory.MLP(2, 4.0), refresh=64)
        self.assert_same_as_reference(design, tokens=130, width=64, batch=1)

    @pytest.mark.usefixtures("own_programs")
    def test_shapes_of_windows_in_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A gradient point of three blocks that stays out of registers, and states of which the square root is kept."""
        monkeypatch.setattr(triton, "REREAD", 0)
        monkeypatch.setattr(triton, "KEPT", 0)
        self.assert_same_as_reference(replace(PLAIN, refresh=48), tokens=144)

    def assert_same_as_reference(self, design: Design, **sizes: int) -> None:
        problem = self.problem_of(design, **sizes)
        found = home(outcome(self.moved(problem), path="triton"))
        assert_same(found, outcome(problem, path="reference"), self.tolerance)

    def test_sequences_in_half_precision(self) -> None:
        problem = self.problem_of(replace(PLAIN, refresh=16), tokens=64, dtype=torch.float32)
        halves = {name: problem[name].bfloat16() for name in ("q", "k", "v")}
        out, state = run(self.moved({**problem, **halves}), path="triton")
        expected, _ = run({**problem, **{name: x.float() for name, x in halves.items()}}, path="reference")
        assert out.dtype == torch.bfloat16
        assert {x.dtype for x in state.tensors()} == {torch.float32, torch.int64}
        worst = float((out.cpu().float() - expected).abs().max() / expected.abs().max())
        assert 1e-5 < worst < 0.02

    @pytest.mark.parametrize("name", ["width", "hidden width", "state", "operation"])
    def test_quick_refusals(self, name: str) -> None:
        design, sizes, reason = REFUSED[name]
        with pytest.raises(ValueError, match=f"path='triton'.* {reason}"):
            run(self.moved(self.problem_of(design, **sizes)), path="triton")


REFUSED = {
    "width": (PLAIN, {"width": 12}, "powers of two; keys of 12, values of 12, up's axis 0 of 12, up's axis 1 of 24"),
    "hidden width": (replace(PLAIN, memory=memory.MLP(2, 1.5)), {}, "powers of two; up's axis 1 of 24, down's axis 0 of 24"),
    "state": (replace(PLAIN, memory=memory.Matrix()), {"width": 512, "tokens": 1}, "262144 numbers of state a head"),
    "operation": (replace(PLAIN, bias=Sorted()), {"tokens": 16}, "aten.sort.default has no Triton form"),
}
