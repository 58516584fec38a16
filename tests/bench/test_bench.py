"""The benchmark at tiny sizes: what it computes, its results' fields, files and messages. Nothing here asserts a time."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import miras
from miras.bench import PEERS, Case, Measurement, Results, contenders, markdown, measure, named_design, with_refresh
from miras.bench.case import memory_inputs
from miras.bench.contenders import OURS, Contender, Ours
from miras.bench.delta_rule import gated_delta_rule
from miras.bench.measure import peak_memory
from miras.bench.ttt_mlp import ttt_mlp
from miras.cli import app, main
from miras.engine import PATHS, dispatch

ROOT = Path(__file__).parents[2]
TINY = Case("yaad", named_design("yaad", ["refresh=4"]), batch=1, tokens=8, heads=2, head_dim=4)

titans_warns = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


def test_ttt_mlp_is_the_design_of_its_name() -> None:
    """The published formulation, and the one definition of `miras.models.ttt_mlp`."""
    heads, d, size = 2, 6, 4
    design = miras.models.ttt_mlp(refresh=size)
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()

    q, k, v = (normal(2, 12, heads, d) for _ in range(3))
    lr = torch.rand(2, 12, heads, generator=g, dtype=torch.float64).mul(0.1).requires_grad_()
    token = (1 / torch.arange(1, size + 1, dtype=torch.float64)).requires_grad_()
    assert design.memory is not None
    weights = {name: normal(heads, s.d_in, s.d_out) for name, s in design.memory.weights(d, d).items()}
    gain, shift = normal(heads, d), normal(heads, d)
    theirs = ttt_mlp(q, k, v, lr, token, weights, gain, shift)
    gates = {"token": token.repeat(3)[None, :, None].expand(2, -1, heads)}
    slow = {"norm.weight": gain, "norm.bias": shift}
    ours, _ = miras.memorize(q, k, v, design=design, weights=weights | slow, lr=lr, gates=gates, path="reference")
    torch.testing.assert_close(theirs, ours, atol=1e-9, rtol=1e-9)
    tensors, probe = [q, k, v, lr, token, *weights.values(), gain, shift], normal(*ours.shape)
    for a, b in zip(*(torch.autograd.grad(out, tensors, probe) for out in (theirs, ours)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_delta_rule_is_gated_deltanet() -> None:
    """In three blocks, from an initial state, with all gradients."""
    case = Case("gated_deltanet", named_design("gated_deltanet"), 2, 96, 2, 4, "float64")
    inputs = memory_inputs(case)
    with torch.no_grad():
        inputs["weights"]["W"].normal_()
    tensors = [*(inputs[name] for name in ("q", "k", "v", "lr", "log_decay")), inputs["weights"]["W"]]
    ours, theirs = miras.memorize(**inputs, path="reference")[0], gated_delta_rule(*tensors)
    torch.testing.assert_close(theirs, ours, atol=1e-9, rtol=1e-9)
    probe = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad(out, tensors, probe) for out in (theirs, ours)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_delta_rule_runs_on_what_our_path_is_given(dtype: str) -> None:
    case = Case("gated_deltanet", named_design("gated_deltanet"), 1, 64, 2, 4, dtype)
    theirs, ours = (contender.forward(case) for contender in (PEERS["delta-rule"], OURS))
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    torch.testing.assert_close(theirs[0](), ours[0](), atol=tolerance, rtol=tolerance)
    assert all(x.isfinite().all() for x in torch.autograd.grad(theirs[0]().sum(), theirs[1]))
    for other, mode in ((replace(case, tokens=40), "forward"), (case, "decode")):
        assert PEERS["delta-rule"].refusal(other, mode) is not None


def test_delta_rule_takes_no_other_design() -> None:
    cases = {name: Case(name, named_design(name), 1, 64, 2, 4) for name in miras.models.NAMED}
    assert [name for name, case in cases.items() if PEERS["delta-rule"].refusal(case, "forward") is None] == [
        "gated_deltanet"
    ]
    for change in ("anchor=initial", "gradient_at=previous", "bias.kind=Dot", "memory.kind=MLP"):
        case = Case("", named_design("gated_deltanet", [change]), 1, 64, 2, 4)
        assert PEERS["delta-rule"].refusal(case, "forward") is not None


FLA_OP = """
import dataclasses, sys, torch, miras
from tests.kernels.fla_cases import interpret, watched
from tests.problems import assert_close
interpret()
calls = watched()
from miras.bench import PEERS, Case, named_design
from miras.bench.case import memory_inputs
case = Case(sys.argv[1], named_design(sys.argv[1]), 1, 37, 2, 16)
inputs = memory_inputs(case)
inputs["weights"] = {name: torch.zeros_like(x) for name, x in inputs["weights"].items()}
forward, tensors = PEERS["fla-op"].forward(case)
out = forward()
assert out.shape == inputs["v"][:, :: case.design.learning.micro_steps].shape, out.shape
assert_close(out, miras.memorize(**inputs, path="reference")[0], tolerance=1e-5)
assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), tensors))
half = dataclasses.replace(case, dtype="float16")
PEERS["fla-op"].forward(half)[0]()
miras.memorize(**memory_inputs(half), path="fla")
assert {**calls[-2].dtypes, "initial_state": torch.float32} == calls[-1].dtypes
assert calls[-1].dtypes["k"] == torch.float16
print(*{call.op for call in calls})
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "op"),
    [
        ("gla", "gla"),
        ("mamba2", "simple_gla"),
        ("deltaproduct", "gated_delta_rule"),
        ("kda", "kda"),
        ("rwkv7", "dplr_delta_rule"),
    ],
)
def test_fla_op_is_the_design(name: str, op: str) -> None:
    """In Triton's interpreter, so in a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FLA_OP, name]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [op]


@pytest.mark.parametrize("name", list(miras.models.NAMED))
def test_every_named_model_can_be_measured(name: str) -> None:
    case = Case(name, named_design(name), 1, 20, 2, 8)
    with torch.no_grad():
        assert OURS.forward(case)[0]().isfinite().all()


@titans_warns
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("name", ["ttt-mlp", "titans-pytorch", "titans-by-token", "sdpa"])
def test_peers_compute_finite_outputs_and_gradients(name: str, dtype: str) -> None:
    case = replace(TINY, dtype=dtype)
    assert PEERS[name].refusal(case, "forward") is None
    forward, tensors = PEERS[name].forward(case)
    out = forward()
    assert out.isfinite().all()
    assert out.dtype == case.torch_dtype
    assert out.numel() == case.batch * case.tokens * case.heads * case.head_dim
    for gradient in torch.autograd.grad(out.float().sum(), tensors, allow_unused=True):
        assert gradient is None or gradient.isfinite().all()


@titans_warns
def test_titans_reads_its_momentum_from_the_design() -> None:
    plain = Case("", named_design("titans_lmm", ["learning.kind=GradientDescent", "refresh=4"]), 1, 8, 2, 4)
    momentum = replace(plain, design=named_design("titans_lmm", ["refresh=4"]))
    counts = [len(PEERS["titans-pytorch"].forward(case)[1]) for case in (plain, momentum)]
    assert counts[0] < counts[1]


def test_decoding_reads_what_a_whole_sequence_reads() -> None:
    inputs = memory_inputs(TINY, context=64)
    with torch.no_grad():
        whole, _ = miras.memorize(**inputs)
        last = OURS.work(TINY, "decode")()
    torch.testing.assert_close(last, whole[:, -1:], atol=1e-5, rtol=1e-5)


def test_measure() -> None:
    cases = [with_refresh(TINY, refresh) for refresh in (2, 4)]
    chosen = contenders(["floor", "ttt-mlp", "delta-rule"], ["reference", "fla"])
    results = measure(cases, ["forward", "decode"], chosen, repeats=2, memory=False)
    found = [(m.name, m.mode, m.case.design.refresh) for m in results.measurements]
    able = {"forward": ["miras", "reference", "floor", "ttt-mlp"], "decode": ["miras", "reference", "floor"]}
    assert found == [(name, mode, r) for r in (2, 4) for mode, names in able.items() for name in names]
    left_out = [(name, "forward") for name in ("fla", "delta-rule")]
    left_out += [(name, "decode") for name in ("fla", "ttt-mlp", "delta-rule")]
    assert [(r.name, r.mode) for r in results.refusals] == left_out
    assert "path='fla' refuses this design" in results.refusals[0].reason
    for m in results.measurements:
        assert len(m.seconds) == 2
        assert min(m.seconds) <= m.median <= max(m.seconds)
        assert m.tokens == (64 if m.mode == "decode" else 8)
        assert m.tokens_per_second == pytest.approx(m.tokens / m.median)
        assert (m.flops is None) == (m.name in ("reference", "ttt-mlp"))
        assert m.peak_bytes is None
    assert set(results.machine) == {"processor", "cores", "threads", "gpu", "torch", "load"}
    again = Results.from_dict(json.loads(json.dumps(results.to_dict())))
    assert again == results
    lines = markdown(results).splitlines()
    assert len(lines) == 2 + len(results.measurements)
    assert all(line.count("|") == lines[0].count("|") for line in lines)


def test_contenders_have_names_of_their_own() -> None:
    chosen = contenders(list(PEERS), list(PATHS))
    assert len({contender.name for contender in chosen}) == len(chosen)


def test_contenders_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(Ours, "work", lambda self, case, mode: lambda: order.append(self.name))
    chosen = [Ours("a", ""), Ours("b", "")]
    measure([TINY], ["forward"], chosen, repeats=2, memory=False)
    assert order == ["a", "b"] * 3


@dataclass(frozen=True)
class Failing(Contender):
    """Raises an error at its n-th call, the one that prepares its work being the first."""

    error: Exception = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    at: int = 1

    def work(self, case: Case, mode: str) -> Callable[[], None]:
        calls = iter(range(1, self.at))

        def call() -> None:
            if next(calls, None) is None:
                raise self.error

        call()
        return call


def test_what_fails_is_left_out_of_the_rest() -> None:
    late = Failing("late", "", ValueError("path='triton' cannot run this design here"), at=3)
    chosen = [Failing("first", ""), OURS, Failing("second", "", at=2), late]
    results = measure([TINY], ["forward"], chosen, repeats=2, memory=False)
    assert [(m.name, len(m.seconds)) for m in results.measurements] == [("miras", 2)]
    size = "8 tokens, refresh 4:"
    assert [(r.name, r.reason) for r in results.refusals] == [
        ("first", f"{size} out of GPU memory"),
        ("second", f"{size} out of GPU memory"),
        ("late", f"{size} path='triton' cannot run this design here"),
    ]
    with pytest.raises(ValueError, match=r"nothing to measure: first \(forward\): 8 tokens, refresh 4: out of GPU memory"):
        measure([TINY], ["forward"], chosen[:1], repeats=1, memory=False)


@pytest.mark.slow
def test_peak_memory_is_unknown_where_it_is_too_much() -> None:
    assert peak_memory(Failing("", ""), TINY, "forward") is None


@pytest.mark.parametrize("mode", ["forward", "decode"])
@pytest.mark.parametrize("name", ["yaad", "gated_deltanet", "deltaproduct", "rwkv7", "titans_mag", "transformer"])
def test_the_path_that_is_named_is_the_one_that_runs(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, ran, plan = Case(name, named_design(name), 2, 64, 2, 8), [], dispatch.plan

    def recorded(*args: Any, **facts: Any) -> dispatch.Plan:
        ran.append(plan(*args, **facts))
        return ran[-1]

    monkeypatch.setattr(dispatch, "plan", recorded)
    OURS.work(case, mode)()
    assert OURS.plan(case, mode) == ran[-1]
    assert f"({ran[-1].path}" in OURS.describe(case, mode)


def test_figures_of_a_measurement() -> None:
    m = Measurement("miras", "", "forward", TINY, 100, (3.0, 1.0, 2.0), flops=8)
    assert (m.median, m.tokens_per_second, m.flop_rate) == (2.0, 50.0, 4.0)
    assert replace(m, flops=None).flop_rate is None


@pytest.mark.slow
def test_peak_memory_is_that_of_one_repeat() -> None:
    """Softmax attention's outputs and nothing else: B T H d numbers, within the page size of the allocator's blocks."""
    case = Case("", named_design("transformer"), batch=4, tokens=4096, heads=8, head_dim=64)
    found = peak_memory(PEERS["sdpa"], case, "forward")
    assert found is not None
    assert 4 * 4 * 4096 * 8 * 64 <= found <= 1.5 * 4 * 4 * 4096 * 8 * 64 + 2**24


@pytest.mark.slow
def test_peak_memory_warms_up_on_whole_blocks() -> None:
    """Also of a peer whose blocks are longer than the design's windows."""
    case = Case("", named_design("gated_deltanet"), batch=1, tokens=128, heads=2, head_dim=16)
    assert peak_memory(PEERS["delta-rule"], case, "forward") is not None


@pytest.mark.parametrize(("tokens", "suffix"), [("8", "png"), ("4,8", "svg")])
def test_command(tmp_path: Path, tokens: str, suffix: str) -> None:
    file, plot = tmp_path / "b.json", tmp_path / f"b.{suffix}"
    sizes = ["--batch", "1", "--tokens", tokens, "--heads", "2", "--head-dim", "4", "--refresh", "2,4", "--repeats", "1"]
    files = ["--json", str(file), "--plot", str(plot)]
    options = [*sizes, "--no-memory", "--mode", "forward", "--peers", "floor,fla-op", *files]
    shown = CliRunner().invoke(app, ["bench", "yaad", "bias.kind=Lp", "bias.p=1.5", *options], catch_exceptions=False)
    assert shown.exit_code == 0
    assert "yaad bias.kind=Lp bias.p=1.5, refresh 2" in shown.output.replace("\n", "")
    assert "not run: fla-op, forward: path='fla' refuses this design" in shown.output
    results = Results.from_dict(json.loads(file.read_text()))
    assert {m.case.design.refresh for m in results.measurements} == {2, 4}
    assert all(m.case.design.bias == miras.bias.Lp(1.5) for m in results.measurements)
    assert all(math.isfinite(m.median) for m in results.measurements)
    assert plot.stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["yad"], "did you mean 'yaad'?"),
        (["yaad", "refresh"], "override 'refresh' is not of the form key=value"),
        (["yaad", "refrehs=3"], "refrehs"),
        (["yaad", "bias.kind=Hubr"], "did you mean 'Huber'?"),
        (["yaad", "--tokens", "many"], "tokens='many'; must be whole numbers"),
        (["yaad", "--refresh", "0"], "refresh='0'; must be whole numbers"),
        (["yaad", "--mode", "backward"], "mode='backward'; allowed: 'forward', 'forward+backward', 'decode'"),
        (["yaad", "--peers", "flor"], "peer='flor'; allowed: 'floor'"),
        (["yaad", "--path", "fast"], "path='fast'; allowed: 'attention'"),
        (["yaad", "--dtype", "int8"], "dtype='int8'; allowed: 'float32'"),
        (["yaad", "--device", "tpus"], "device='tpus'; allowed: cpu"),
        (["yaad", "--batch", "0"], "batch=0; must be at least 1"),
        (["yaad", "--repeats", "0"], "repeats=0; must be at least 1"),
        (["yaad", "--threads", "0"], "threads=0; must be at least 1"),
        (["yaad", "--plot", "plot.gif"], "a plot ends in one of .png"),
        (["yaad", "--json", "nowhere/b.json"], "there is no folder nowhere"),
    ],
)
def test_errors_say_what_is_allowed(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_status:
        main(["bench", *arguments])
    assert exit_status.value.code == 1
    shown: Any = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err


def test_nothing_to_measure_says_why() -> None:
    with pytest.raises(ValueError, match=r"nothing to measure: fla-op \(forward\): path='fla' refuses this design"):
        measure([TINY], ["forward"], [PEERS["fla-op"]], repeats=1, memory=False)
