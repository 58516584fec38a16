"""The native path: C++ programs, built here with few optimisations but where numbers and speed depend on them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import miras
from miras import bias, learning, memory, retention
from miras.design import Design
from miras.kernels import native, recompute, scan
from tests.kernels.scan_cases import PLAIN, Scans, Sorted, online
from tests.problems import assert_close, assert_same, leaves, outcome, random_problem, run, with_leaves


@pytest.fixture
def as_users_build(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With all optimisations: see `conftest.py`."""
    monkeypatch.delenv("MIRAS_CXXFLAGS")
    native.forget()
    yield
    native.forget()


@pytest.fixture
def built_anew() -> Iterator[None]:
    native.forget()
    yield
    native.forget()


@pytest.mark.slow
class TestNative(Scans):
    path = "native"

    @pytest.mark.parametrize("refresh", [1, 4])
    def test_a_batch_of_products(self, refresh: int) -> None:
        """The steps of several tokens, each made orthogonal by itself."""
        problem = self.problem_of(replace(PLAIN, refresh=refresh, learning=learning.OmegaMuon(3, steps=2)), tokens=6)
        assert_same(outcome(problem, path="native"), outcome(problem, path="reference"), self.tolerance)


QUICK = {
    "descent": (PLAIN, {"tokens": 37}),
    "weights of no whole vectors": (PLAIN, {"tokens": 10, "width": 5}),
    "momentum, several blocks a window": (
        replace(PLAIN, learning=learning.Momentum(), refresh=96),
        {"tokens": 192, "width": 4},
    ),
    "a mirror map online": (replace(PLAIN, retention=retention.LqMirror(4.0), link_at="token", refresh=4), {"tokens": 6}),
}


MATRIX = replace(PLAIN, memory=memory.Matrix())

UNROLLED = {
    "online": (online(replace(PLAIN, bias=bias.Lp(3.0))), {"tokens": 10}),
    "online, three layers, momentum": (online(replace(PLAIN, memory=memory.MLP(3, 1.0), learning=learning.Momentum())), {}),
    "online, fast biases from the origin": (
        online(replace(PLAIN, memory=memory.MLP(2, 2.0, fast_bias=True), anchor="origin")),
        {},
    ),
    "online, gated": (online(replace(PLAIN, memory=memory.GatedMLP(2.0), bias=bias.Huber("norm"))), {}),
    "online, several steps a token": (online(replace(MATRIX, learning=learning.MultiStep(2))), {}),
    "online, at the decayed weights": (replace(online(MATRIX), gradient_at="decayed"), {}),
    "online, implicit": (online(replace(MATRIX, bias=bias.Envelope(bias.Robust()))), {}),
    "online, constant gradients": (online(replace(MATRIX, bias=bias.Dot())), {"tokens": 70}),
    "links that scale": (replace(PLAIN, retention=retention.LqRms(3.5, 0.7), refresh=4), {"tokens": 14}),
    "links that scale, momentum": (
        replace(PLAIN, retention=retention.Lq(4.0), refresh=8, learning=learning.Momentum()),
        {"tokens": 18},
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "online" else pytest.mark.slow) for name in UNROLLED]
)
@pytest.mark.usefixtures("built_anew")
def test_steps_one_after_the_other_in_a_block(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with large matrices, of which as few as possible are read again."""
    monkeypatch.setattr(native, "UNROLLED", 4)
    monkeypatch.setattr(recompute, "OUT_OF_REACH", 0)
    design, sizes = UNROLLED[name]
    sizes = {"tokens": 6, "width": 8, "batch": 1, "heads": 2, "slow": True, "dtype": torch.float64, **sizes}
    problem = random_problem(design, **sizes)
    assert_same(outcome(problem, path="native"), outcome(problem, path="reference"), 1e-9)


@pytest.mark.parametrize("name", QUICK)
def test_equals_reference(name: str) -> None:
    design, sizes = QUICK[name]
    problem = random_problem(design, **{"width": 16, "batch": 2, "heads": 2, "slow": True, "dtype": torch.float64, **sizes})
    assert_same(outcome(problem, path="native"), outcome(problem, path="reference"), 1e-9)


@pytest.mark.usefixtures("as_users_build")
@pytest.mark.parametrize(
    "design",
    [
        pytest.param(PLAIN, id="descent"),
        pytest.param(QUICK["momentum, several blocks a window"][0], id="momentum", marks=pytest.mark.slow),
        pytest.param(online(PLAIN), id="online", marks=pytest.mark.slow),
        pytest.param(replace(PLAIN, retention=retention.LqRms(4.0)), id="links that scale", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("width", [64, pytest.param(24, marks=pytest.mark.slow)], ids=["registers filled", "with a rest"])
def test_single_precision(design: Design, width: int) -> None:
    """Where vectors of numbers and approximations of functions are at work."""
    problem = random_problem(design, tokens=96, width=width, batch=1, heads=2, slow=True, dtype=torch.float32)
    exact = with_leaves(problem, {key: x.double() for key, x in leaves(problem).items()})
    plain = "frozen" if design.refresh > 1 else "substituted"
    expected = {key: x.float() for key, x in outcome(exact, path=plain).items()}
    assert_same(outcome(problem, path="native"), expected, 3e-5)


SIZES = [
    *((1, 256, 64), (1, 64, 256), (1, 100, 40), (1, 5, 16), (1, 16, 64), (1, 48, 2), (64, 1, 64), (256, 1, 16), (5, 1, 3)),
    *((3, 48, 40), (16, 64, 64), (16, 5, 40), (16, 80, 16), (32, 32, 32), (33, 80, 64), (40, 48, 40), (64, 256, 16)),
]
"""Rows and columns of C, and what is summed over: of whole vectors, and with a rest."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float", "double"])
def test_products(dtype: torch.dtype) -> None:
    """A by rows and by columns, and B."""
    lines, cases = [], []
    for m, n, k in SIZES:
        for a in ((k, 1), (1, m)):
            for b in ((n, 1), (1, k)):
                call = f"product<{m}, {n}, {k}, {a[0]}, {a[1]}, {b[0]}, {b[1]}>"
                lines.append(f"case {len(cases)}: {call}(a, b, c); break;")
                cases.append((m, n, k, a, b))
    head = ['extern "C" void run(real **tensors, long number) {', "real *a = tensors[0], *b = tensors[1], *c = tensors[2];"]
    library = native.built(native.source(native.REALS[dtype], [*head, "switch (number) {", *lines, "}}"]))
    for number, (m, n, k, a, b) in enumerate(cases):
        x, y, found = torch.randn(m * k, dtype=dtype), torch.randn(k * n, dtype=dtype), torch.full((m, n), 7.0, dtype=dtype)
        library.run((ctypes.c_void_p * 3)(*(t.data_ptr() for t in (x, y, found))), ctypes.c_long(number))
        expected = x.double().as_strided((m, k), a) @ y.double().as_strided((k, n), b)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4 if dtype == torch.float32 else 1e-12)


FUNCTIONS = {"exp_": torch.exp, "log_": torch.log, "erf_": torch.erf, "tanh_": torch.tanh}


@pytest.mark.usefixtures("as_users_build")
def test_functions_of_single_precision() -> None:
    head = 'extern "C" void {0}s(const float *x, float *y, long n)'
    text = head + " {{\n#pragma omp simd\nfor (long i = 0; i < n; i++) y[i] = {0}(x[i]);\n}}"
    library = native.built(native.source("float", [text.format(name) for name in FUNCTIONS]))
    inf, nan = float("inf"), float("nan")
    special = torch.tensor([0.0, 1.0, -1.0, inf, -inf, nan, 88.7, 88.8, -87.0, -103.0, -104.5, 1e-38, 1e-42, 3e38, 1e-20])
    x = torch.cat([torch.linspace(-110, 95, 4001), torch.linspace(-5, 5, 4001), torch.logspace(-30, 30, 1001), special])
    for name, function in FUNCTIONS.items():
        y = torch.empty_like(x)
        getattr(library, f"{name}s")(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_long(len(x)))
        torch.testing.assert_close(y, function(x.double()).float(), rtol=5e-7, atol=2e-7, equal_nan=True)


def moved_about(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """What moves numbers, of x [5, 6] and y [3, 6], each read again by a product or a sum."""
    joined = torch.cat([y, x, 2.0 * y], dim=0)
    return (
        joined.contiguous(),
        torch.ops.aten.slice_backward(y.T.contiguous(), [6, 8], 1, 2, 5, 1),
        torch.ops.aten.select_backward(x[:, 0].contiguous(), [4, 5], 0, 2),
        x.select_scatter(y[0], 0, 3).flip([1]).cumsum(1),
        torch.stack([y[0], y[2]], dim=1),
        (joined.T @ joined).tril(-1).T.contiguous(),
        joined[2:7].amax(0) + x.amin(1).mean(),
        (x @ y.T).T.reshape(15) * 0.5,
    )


def test_operations_that_move_numbers() -> None:
    given = [torch.randn(5, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)]
    expected = moved_about(*given)
    graph = make_fx(moved_about)(*given).graph
    lines, size = native._body(graph, ["x", "y"], [f"r{i}" for i in range(len(expected))])
    names = ["x", "y", *(f"r{i}" for i in range(len(expected)))]
    pointers = [f"real *{name} = tensors[{i}];" for i, name in enumerate(names)]
    head = ['extern "C" void run(real **tensors) {', f"real arena[{size + 1}];"]
    library = native.built(native.source("double", [*head, *pointers, *lines, "}"]))
    found = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in expected]
    library.run((ctypes.c_void_p * len(names))(*(x.data_ptr() for x in [*given, *found])))
    for i, (actual, wanted) in enumerate(zip(found, expected, strict=True)):
        assert_close(actual, wanted, f"result {i}", 1e-12)


@dataclass(frozen=True)
class Shaped(bias.Bias):
    """A user's gradient of a few operations, by name."""

    form: str = ""

    def loss(self, y: Tensor, v: Tensor, gates: bias.Gates) -> Tensor:
        raise NotImplementedError

    def gradient(self, y: Tensor, v: Tensor, gates: bias.Gates) -> Tensor:
        return SHAPES[self.form](y - v)


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "a high power": lambda x: (0.3 * x) ** 9 + 1 / (2 + x.square()) ** 10,
    "a power by a tensor": lambda x: x ** (2 + torch.ones_like(x).cumsum(-1)),
    "truth values": lambda x: (x - x.clamp_min(0.1)).bool().to(x.dtype) * x,
    "whole numbers": lambda x: (3 * x).to(torch.int32).to(x.dtype),
    "halves": lambda x: x.to(torch.bfloat16).to(x.dtype),
    "too high a power": lambda x: x**99,
}


@pytest.mark.parametrize("form", list(SHAPES)[:3])
def test_powers_and_truth_values(form: str) -> None:
    problem = random_problem(replace(PLAIN, bias=Shaped(form)), tokens=32, dtype=torch.float32)
    assert_same(outcome(problem, path="native"), outcome(problem, path="frozen"), 1e-4)


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ("whole numbers", r"a cast of torch.float32 to torch.int32"),
        ("halves", r"a cast of torch.float32 to torch.bfloat16"),
        ("too high a power", r"a power of 99; products have at most 64 factors"),
    ],
)
def test_what_would_be_other_numbers(form: str, reason: str) -> None:
    problem = random_problem(replace(PLAIN, bias=Shaped(form)), tokens=32, dtype=torch.float32)
    with pytest.raises(ValueError, match=reason):
        run(problem, path="native")


def test_without_memory() -> None:
    lines = 'extern "C" int run(long rows, long arena) { return for_rows(rows, 3, arena, [](long, real *) {}); }'
    library = native.built(native.source("float", [lines]))
    numbers = [ctypes.c_long(7), ctypes.c_long(2**50), ctypes.c_long(16)]
    assert not library.run(*numbers[:2]) and library.run(numbers[0], numbers[2])


@pytest.mark.usefixtures("built_anew")
def test_what_it_cannot_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = random_problem(replace(PLAIN, bias=Sorted()), tokens=16)
    with pytest.raises(ValueError, match=r"path='native' cannot run .* aten.sort.default has no C\+\+ form here"):
        run(problem, path="native")
    plain = random_problem(PLAIN, tokens=16)
    monkeypatch.setenv("MIRAS_CXXFLAGS", "-no-such-flag")
    with pytest.raises(ValueError, match="no-such-flag"):
        run(plain, path="native")
    native.forget()
    occupied = tmp_path / "file"
    occupied.write_text("")
    monkeypatch.setenv("MIRAS_CACHE_DIR", str(occupied))
    with pytest.raises(ValueError, match=str(occupied)):
        run(plain, path="native")
    native.forget()
    monkeypatch.setattr(native, "compiler", lambda: ())
    with pytest.raises(ValueError, match=r"no C\+\+ compiler"):
        run(plain, path="native")
    assert "for CPUs, not for cuda" in miras.explain(PLAIN, device="cuda").refusals["native"]


def test_the_compiler_is_the_one_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cache", "g++"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for asked, found in (
        ("cache clang++ -g", (str(tmp_path / "cache"), "clang++", "-g")),
        ("nowhere", ()),
        (" ", (str(tmp_path / "g++"),)),
    ):
        monkeypatch.setenv("CXX", asked)
        native.compiler.cache_clear()
        assert native.compiler() == found
        assert native.unusable(torch.device("cpu")) == (None if found else "no C++ compiler (nowhere)")
    native.compiler.cache_clear()


def test_where_it_would_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "compiler", lambda: ("g++",))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert miras.engine.plan(PLAIN, rows=4).path == "native"
    assert "3 sequences and heads leave some of 4 threads" in miras.engine.plan(PLAIN, rows=3).refusals["native"]
    assert "blocks of one step" in miras.engine.plan(PLAIN, per_channel=True).refusals["native"]
    assert miras.engine.plan(MATRIX, per_channel=True).path == "native"
    assert "native" in miras.engine.plan(PLAIN, work=native.MIN_WORK - 1).refusals


@pytest.mark.usefixtures("built_anew")
@pytest.mark.parametrize(
    ("learned", "length", "blocks", "kept_of"),
    [(learning.GradientDescent(), 8, 7, {3, 1}), (learning.Momentum(), 4, 14, {4, 2})],
    ids=["every third", "every fourth, two a window"],
)
def test_large_states_are_not_all_kept(
    learned: learning.Learning, length: int, blocks: int, kept_of: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the blocks of seven windows some, and the others are made again from one to the next."""
    monkeypatch.setattr(native, "MAX_BLOCK", length)
    problem = random_problem(
        replace(PLAIN, refresh=8, learning=learned), tokens=56, width=8, heads=2, slow=True, dtype=torch.float64
    )
    kept = list[int]()
    scan_forward = scan.Scan.forward

    def watched(*args: Any) -> Any:
        found = scan_forward(*args)
        kept.extend(x.shape[2] for x in found.kept)
        return found

    monkeypatch.setattr(scan.Scan, "forward", watched)
    for large, counts in ((2**20, {blocks}), (1, kept_of)):
        monkeypatch.setattr(native, "LARGE", large)
        kept.clear()
        native.forget()
        assert_same(outcome(problem, path="native"), outcome(problem, path="reference"), 1e-9)
        assert set(kept) == counts


@pytest.mark.usefixtures("built_anew")
def test_programs_are_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIRAS_CACHE_DIR", str(tmp_path))
    problem = random_problem(PLAIN, tokens=32)
    expected = outcome(problem, path="native")
    libraries = sorted((tmp_path / "native").iterdir())
    assert [x.suffix for x in libraries] == [".so"] * len(libraries) and len(libraries) == 2
    native.forget()
    monkeypatch.setattr(native.subprocess, "run", None)
    longer = random_problem(PLAIN, tokens=64, batch=3, heads=1)
    assert_same(outcome(problem, path="native"), expected, 0.0)
    assert_same(outcome(longer, path="native"), outcome(longer, path="frozen"), 1e-9)


@pytest.mark.usefixtures("built_anew")
def test_a_library_that_cannot_be_read_is_built_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = native.source("float", ['extern "C" int run() { return 3; }'])
    monkeypatch.setenv("MIRAS_CACHE_DIR", str(tmp_path))
    name = native._compiled(text).name
    monkeypatch.setenv("MIRAS_CACHE_DIR", str(tmp_path / "other"))
    (tmp_path / "other" / "native").mkdir(parents=True)
    (tmp_path / "other" / "native" / name).write_text("half a library")
    assert native.built(text).run() == 3


def test_rows_do_not_depend_on_threads() -> None:
    problem = random_problem(replace(PLAIN, memory=memory.Matrix()), tokens=32, batch=3, heads=2)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 4, 16):
            torch.set_num_threads(count)
            found.append(outcome(problem, path="native"))
    finally:
        torch.set_num_threads(threads)
    assert_same(found[1], found[0], 0.0)
    assert_same(found[2], found[0], 0.0)
