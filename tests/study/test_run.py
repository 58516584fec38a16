"""Runs and the runner: the same examples for every model, resuming, failures as rows, changed settings."""

import math
import os
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from miras import models
from miras.kernels.fused import compiled_from, has_compiler
from miras.study import run as running
from miras.study import runner
from miras.study.config import ResourcesSection, Study, study_from
from miras.study.flops import UNCOUNTED, count_flops
from miras.study.model import build, measures
from miras.study.plan import Run
from miras.study.run import TEST, Row, execute, measure, split
from miras.study.runner import run_study
from miras.study.search import batches
from miras.study.store import Store
from miras.tasks import DNA, Batch, Task, Weather, ridge
from tests.study.conftest import TinyEcho, raw_study

REPOSITORY = Path(__file__).parents[2]


def rows(study: Study) -> dict[tuple[str, str, int], Row]:
    store = Store(Path(study.out))
    planned = [item for batch in batches(study, store.get) for item in batch]
    return {(item.task, item.model, item.run.seed): store.rows()[item.run.key] for item in planned}


def first_run(study: Study) -> Run:
    return next(batches(study, lambda _: None))[0].run


def test_a_study_runs_and_all_models_see_the_same(tiny: Study) -> None:
    run_study(tiny, workers=0)
    found = rows(tiny)
    assert {row.status for row in found.values()} == {"done"}, [row.trace for row in found.values()]
    for seed in (0, 1):
        assert found["echo", "Delta", seed].examples == found["echo", "Transformer", seed].examples
    assert found["echo", "Delta", 0].examples != found["echo", "Delta", 1].examples
    row = found["echo", "Delta", 0]
    assert (row.steps, row.tokens) == (4, 4 * 4 * 6)
    assert [(test["condition"], test["count"]) for test in row.tests] == [("", 8), ("12 tokens", 8)]
    assert set(row.tests[0]["metrics"]) == {"accuracy", "loss"}
    assert row.validation != row.tests[0]["metrics"]
    assert len(row.curve) == 4
    assert min(row.tokens_per_second, row.peak_memory, row.flops, row.seconds) > 0


def test_flops_of_a_transformer_are_those_of_its_weights_and_its_attention() -> None:
    task, size = TinyEcho(num_tokens=10), {"hidden_size": 8, "num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 12}
    model = build(task, models.named("transformer").to_dict(), size)
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    # Forward 2, backward 4 a weight; and two products of every query with every key or value, 2 layers of width 8.
    assert count_flops(model, task) == 6 * weights + 3 * 2 * (2 * 10 * 8) * 2


def test_flops_of_a_triangular_system() -> None:
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        torch.linalg.solve_triangular(torch.eye(5).expand(3, 5, 5), torch.ones(3, 5, 2), upper=False)
    assert counter.get_total_flops() == 2 * 3 * 5 * 5 * 2


@pytest.mark.skipif(not has_compiler(), reason="the other path needs a C++ compiler; install g++")
def test_flops_are_those_of_torchs_operations_whatever_path_runs() -> None:
    task, size = TinyEcho(num_tokens=32), {"hidden_size": 8, "num_hidden_layers": 1, "num_heads": 2, "intermediate_size": 8}
    model = build(task, models.named("ttt_mlp").to_dict(), size)
    expected = count_flops(model, task)
    with compiled_from(0):
        with FlopCounterMode(display=False) as unaware:
            model(task.sample(1, np.random.default_rng(0)).inputs).sum().backward()
        assert unaware.get_total_flops() / 32 < expected == count_flops(model, task)


def test_a_run_again_is_the_same_to_the_bit(tiny: Study) -> None:
    run = first_run(tiny)
    first, second = (execute(run, ResourcesSection()) for _ in range(2))
    assert (first.tests, first.validation, first.curve) == (second.tests, second.validation, second.curve)


def test_finished_runs_are_not_done_again(tiny: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    run_study(replace(tiny, seeds=[0]), workers=0)
    done: list[int] = []
    monkeypatch.setattr(runner, "execute", lambda run, *_: done.append(run.seed) or execute(run, ResourcesSection()))
    run_study(tiny, workers=0)
    assert done == [1, 1]
    run_study(tiny, workers=0)
    assert len(done) == 2


SCRIPT = """
import sys, time
from pathlib import Path
from miras.study import runner
from miras.study.config import study_from
from tests.study.conftest import raw_study
def slow(run, *rest, do=runner.execute):
    row = do(run, *rest)
    print(run.key, flush=True)
    if len(sys.argv) > 2: time.sleep(60)
    return row
runner.execute = slow
runner.run_study(study_from(raw_study(Path(sys.argv[1]))), workers=0)
"""


@pytest.mark.slow
def test_killed_and_repeated_in_two_processes_every_run_is_done_once(tiny: Study) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY)]),
        "OMP_NUM_THREADS": "1",
    }

    def start(*extra: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SCRIPT, tiny.out, *extra]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    killed = start("wait")
    assert killed.stdout is not None
    assert killed.stdout.readline()  # Its first run is computed, not yet written.
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert Store(Path(tiny.out)).rows() == {}
    both = [start(), start()]
    computed = [line for process in both for line in process.communicate()[0].split()]
    assert [process.returncode for process in both] == [0, 0]
    assert len(computed) == len(set(computed)) == len(Store(Path(tiny.out)).rows()) == 4


def test_a_claimed_run_is_waited_for(tiny: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    study = replace(tiny, seeds=[0])
    store, key = Store(Path(study.out)), first_run(study).key
    claim = store.claim(key)
    assert claim is not None

    def finish(_: float) -> None:
        store.put(Row(key, "done", error="elsewhere"))
        claim.release()

    monkeypatch.setattr(time, "sleep", finish)
    run_study(study, workers=0)
    assert store.rows()[key].error == "elsewhere"
    assert len(store.rows()) == 2


def test_failures_are_rows_and_are_repeated_when_asked(tiny: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    study = replace(tiny, seeds=[0])
    with monkeypatch.context() as patch:
        patch.setattr(running, "test", lambda *_: 1 / 0)
        run_study(study, workers=0)
    assert {(row.status, row.error) for row in rows(study).values()} == {("failed", "ZeroDivisionError: division by zero")}
    assert all("1 / 0" in row.trace for row in rows(study).values())
    run_study(study, workers=0)
    assert {row.status for row in rows(study).values()} == {"failed"}
    run_study(study, workers=0, retry=True)
    assert {row.status for row in rows(study).values()} == {"done"}


def test_divergence_is_a_row(tiny: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    spoilt = type(Task.from_dict(first_run(tiny).task))
    monkeypatch.setattr(spoilt, "loss", lambda self, outputs, targets: outputs.sum() * float("nan"))
    row = execute(first_run(tiny), ResourcesSection())
    assert (row.status, row.steps) == ("diverged", 1)
    assert row.error.startswith("training stopped at step 1: loss nan")


def test_a_gpu_that_is_not_there_is_a_failure_that_says_so(tiny: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    row = execute(first_run(tiny), ResourcesSection(gpus=1))
    assert row.status == "failed"
    assert "no CUDA device; set it to 0" in row.error


def test_vectors_are_learned_too(tmp_path: Path) -> None:
    raw = raw_study(tmp_path, tasks={"sum": {"kind": "TinySum"}}, seeds=[0], models={"Delta": {"name": "deltanet"}})
    before = execute(first_run(study_from(raw)), ResourcesSection())
    raw["train"] |= {"steps": 60}
    after = execute(first_run(study_from(raw)), ResourcesSection())
    assert set(after.tests[0]["metrics"]) == {"error"}
    assert after.tests[0]["metrics"]["error"] < 0.5 * before.tests[0]["metrics"]["error"]


def test_metrics_are_means_over_what_is_asked_whatever_the_batches(tiny: Study) -> None:
    run = first_run(tiny)
    task, model = Task.from_dict(run.task), build(Task.from_dict(run.task), run.design, run.size)
    draws = task.sample(7, np.random.default_rng([0, TEST]))
    [whole] = measure([model], task, [draws])
    [parts] = measure([model], task, split(draws, 3))
    right = (model(draws.inputs).argmax(-1) == draws.targets).double().mean()
    assert whole == pytest.approx(parts, rel=1e-5)
    assert whole["accuracy"] == pytest.approx(right.item())


def test_selection_and_references_are_the_tasks_own(tmp_path: Path) -> None:
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_heads": 1}
    weather = {"kind": "Weather", "num_hours": 30, "horizon": 2, "longer": [2]}
    model = build(Weather(horizon=2), models.named("deltanet").to_dict(), size)
    run = replace(first_run(study_from(raw_study(tmp_path, tasks={"weather": weather}))), task=weather)
    task = Weather.from_dict(weather)
    found = running.test(run, task, model)
    for split_name, seed, expected in (
        ("validation", [run.seed, running.VALIDATION], found["validation"]["error"]),
        ("test", [run.seed, TEST, 0], found["tests"][0]["metrics"]["error"]),
    ):
        form = replace(task, split=split_name, longer=())
        draws = form.sample(8, np.random.default_rng(seed))
        assert expected == pytest.approx(measure([model], form, [draws])[0]["error"], rel=1e-5)
    metrics = found["tests"][1]["metrics"]
    inputs, targets = task.tests()["60 hours"].sample(8, np.random.default_rng([run.seed, TEST, zlib.crc32(b"60 hours")]))
    for name, outputs in (
        ("last temperature", inputs[..., :1].expand_as(targets)),
        ("ridge regression on 24 hours", ridge(task)(inputs)),
    ):
        asked = ~targets.isnan()
        expected = (outputs - targets)[asked].square().mean().item()
        assert metrics[f"error of {name}"] == pytest.approx(expected, rel=1e-5)


def test_the_perplexity_is_that_of_the_mean_loss() -> None:
    task = DNA(num_tokens=16, longer=())
    inputs = torch.zeros(4, 16, dtype=torch.long)
    [found] = measure([nn.Embedding(4, 4)], task, [Batch(inputs[:1], inputs[:1]), Batch(inputs[1:], inputs[1:])])
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert math.isfinite(task.derived({"loss": 1e4})["perplexity"])


def test_what_a_task_measures_is_known_before_a_run(tmp_path: Path) -> None:
    genome = tmp_path / "genome.fna"
    genome.write_text(">x\n" + "ACGT" * 100 + "\n")
    assert measures(DNA(path=str(genome))) == ["accuracy", "loss", "bits a base", "perplexity"]


def test_a_trained_model_is_run_with_other_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = {"Yaad": {"name": "yaad", "design": {"refresh": 4}, "evaluate": {"design.refresh": [1, 4]}}}
    run = first_run(study_from(raw_study(tmp_path, models=models, seeds=[0])))
    kept: list[torch.nn.Module] = []
    monkeypatch.setattr(running, "test", lambda *given, do=running.test: kept.append(given[2]) or do(*given))
    row = execute(run, ResourcesSection())
    by_setting = {test["settings"].get("design.refresh"): test["metrics"] for test in row.tests if test["condition"] == ""}
    assert by_setting[1]["deviation"] == 0.0
    assert by_setting[4]["loss"] == by_setting[None]["loss"]
    assert "deviation" not in by_setting[None]
    task = Task.from_dict(run.task)
    online = build(task, run.evaluate[0]["design"], run.size)
    online.load_state_dict(kept[0].state_dict())
    inputs = task.sample(8, np.random.default_rng([0, TEST, 0])).inputs
    with torch.no_grad():
        exact, stale = online.eval()(inputs), kept[0].eval()(inputs)
    assert by_setting[4]["deviation"] == pytest.approx(((stale - exact).norm() / exact.norm()).item(), rel=1e-5)
    assert by_setting[4]["deviation"] > 1e-6


def test_settings_that_change_the_parameters_are_refused(tmp_path: Path) -> None:
    models = {"Yaad": {"name": "yaad", "evaluate": {"design.memory": [{"kind": "Matrix"}]}}}
    row = execute(first_run(study_from(raw_study(tmp_path, models=models))), ResourcesSection())
    assert "evaluate changes the model's parameters" in row.error


def test_guided_trials_follow_from_the_rows_and_stop_where_they_end(tmp_path: Path) -> None:
    axes = {"train.lr": {"low": 1e-4, "high": 1.0, "log": True}, "design.anchor": ["initial", "origin"]}
    raw = raw_study(tmp_path, axes=axes, seeds=[0, 1], models={"Delta": {"name": "deltanet"}})
    study = study_from({**raw, "search": {"kind": "optuna", "trials": 60, "batch": 6}})
    table: dict[str, Row] = {}
    seen: list[list[float]] = []
    for batch in batches(study, table.get):
        assert len(batch) == 12
        seen.append([dict(item.settings)["train.lr"] for item in batch])
        for item in batch:
            rate = dict(item.settings)["train.lr"]
            failed = rate > 0.5
            accuracy = -abs(np.log10(rate) + 2)  # best at 1e-2
            table[item.run.key] = Row(item.run.key, "failed" if failed else "done", validation={"accuracy": accuracy})
    assert len(seen) == 10
    again = [[dict(item.settings)["train.lr"] for item in batch] for batch in batches(study, table.get)]
    assert again == seen
    guided = np.abs(np.log10(np.concatenate(seen[5:])) + 2).mean()
    assert guided < 0.75  # at random it is 1 on average


@pytest.mark.slow
@pytest.mark.parametrize("cluster", [False, True])
def test_ray_gives_the_same_rows(tiny: Study, cluster: bool) -> None:
    study = replace(tiny, seeds=[0])
    here = {item.run.key: execute(item.run, ResourcesSection()).tests for item in next(batches(study, lambda _: None))}
    script = """
import sys
from pathlib import Path
from miras.study.config import study_from
from miras.study.runner import run_study
from tests.study.conftest import raw_study
study, address = study_from(raw_study(Path(sys.argv[1]), seeds=[0], imports=["tests.study.conftest"])), None
if sys.argv[2:] == ["cluster"]:
    import ray
    from ray.cluster_utils import Cluster
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    address, begin = cluster.address, ray.init
    ray.init = lambda **options: begin(**options) if options["address"] == address else sys.exit("another cluster")
try:
    run_study(study, address, workers=2)
finally:
    if address:
        cluster.shutdown()
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY)])}
    command = [sys.executable, "-c", script, study.out, *(["cluster"] if cluster else [])]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
    found = Store(Path(study.out)).rows()
    assert {row.status for row in found.values()} == {"done"}, [row.trace for row in found.values()]
    assert {key: row.tests for key, row in found.items()} == here
