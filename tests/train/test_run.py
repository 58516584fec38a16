"""A run from start to finish: results, exact resume after a kill, the stop on non-finite numbers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from miras.evals.checkpoint import evaluate_checkpoint
from miras.train.callbacks import TrainingDiverged, read_metrics
from miras.train.compare import train_all
from miras.train.config import Recipe, read_recipe
from miras.train.folder import last_checkpoint, read_result
from miras.train.run import LanguageTrainer, train
from tests.train.conftest import tiny_recipe

FIGURES = ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_bits_per_byte")


def figures(folder: Path) -> list[dict[str, float]]:
    """The metrics that do not depend on the clock."""
    return [{k: line[k] for k in ("step", *FIGURES) if k in line} for line in read_metrics(folder / "metrics.jsonl")]


def test_a_run_leaves_a_model_that_loads_and_scores_the_same(corpus: Path, tmp_path: Path) -> None:
    result = train(tiny_recipe(corpus, tmp_path / "run"))
    folder = Path(result.folder)
    assert read_result(folder) == result
    assert (result.steps, result.tokens) == (8, 8 * 2 * 16)
    assert result.perplexity == pytest.approx(torch.tensor(result.loss, dtype=torch.float64).exp().item())
    assert result.tokens_per_second > 0
    assert result.sample.startswith("the king")
    assert any((folder / "tensorboard").iterdir())
    lines = figures(folder)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
    assert [line["step"] for line in lines if "eval_loss" in line] == [4, 8]
    assert lines[-1]["eval_loss"] == pytest.approx(result.loss, rel=1e-6)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert evaluate_checkpoint(folder, model, tokenizer).loss == pytest.approx(result.loss, rel=1e-6)
    assert evaluate_checkpoint(folder / "checkpoint-8", model, tokenizer).tokens == result.validation_tokens


def test_a_finished_run_is_not_trained_again_and_another_recipe_is_refused(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(corpus, tmp_path / "run", "train.steps=2")
    result = train(recipe)
    with monkeypatch.context() as patch:
        patch.setattr(LanguageTrainer, "train", lambda *_, **__: pytest.fail("trained again"))
        assert train(recipe) == result
        with pytest.raises(ValueError, match=r"differs in train.steps, train.lr\. .* \(--overwrite\)"):
            train(tiny_recipe(corpus, tmp_path / "run", "train.lr=0.5", "train.steps=3"))
    assert train(tiny_recipe(corpus, tmp_path / "run", "train.steps=3"), overwrite=True).steps == 3


def last_epoch(folder: Path) -> float:
    return read_metrics(folder / "metrics.jsonl")[-1]["epoch"]


def kill_at(step: int, recipe: Recipe, folder: Path) -> None:
    """Train in a process of its own and send it SIGKILL once it has logged `step`."""
    file = folder.parent / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    command = [sys.executable, "-c", SLOWLY, str(file)]
    log = (folder.parent / "log.txt").open("w")
    process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ)
    deadline = time.monotonic() + 120
    while max((line["step"] for line in read_metrics(folder / "metrics.jsonl")), default=0) < step:
        assert process.poll() is None, (folder.parent / "log.txt").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    log.close()


SLOWLY = """
import sys, time
from miras.train.callbacks import MetricsLog
from miras.train.config import read_recipe
from miras.train.run import train
write = MetricsLog.on_log
def write_slowly(*arguments, **keywords):
    write(*arguments, **keywords)
    time.sleep(0.1)
MetricsLog.on_log = write_slowly
train(read_recipe(sys.argv[1]))
"""


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param((), id="rows"),
        pytest.param(("train.accumulate=2", "data.isolate_documents=true"), id="packed", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_exactly(corpus: Path, tmp_path: Path, extra: tuple[str, ...]) -> None:
    # One pass over the corpus is shorter than the run, so the kill at step 26 falls into a later pass.
    settings = ("train.steps=30", "train.save_every=10", "train.eval_every=15", "train.batch_size=16", *extra)
    whole = tiny_recipe(corpus, tmp_path / "whole", *settings)
    killed = tiny_recipe(corpus, tmp_path / "killed", *settings)
    expected = train(whole)
    assert last_epoch(tmp_path / "whole") > 2
    kill_at(26, killed, tmp_path / "killed")
    checkpoint = last_checkpoint(tmp_path / "killed")
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-20"
    result = train(killed)
    assert figures(tmp_path / "killed") == figures(tmp_path / "whole")
    assert (result.loss, result.sample) == (expected.loss, expected.sample)


def test_streamed_rows_resume_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.train.conftest import sentences

    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": sentences(i, 5)}) + "\n" for i in range(20)))
    settings = ("data.streaming=true", "data.validation_documents=4", "train.steps=12", "train.save_every=5")
    train(tiny_recipe(file, tmp_path / "whole", *settings))
    stopped = tiny_recipe(file, tmp_path / "stopped", *settings)
    with monkeypatch.context() as patch:
        step = LanguageTrainer.training_step

        def stop(self: LanguageTrainer, *args: object, **kwargs: object) -> torch.Tensor:
            if self.state.global_step == 7:
                raise KeyboardInterrupt
            return step(self, *args, **kwargs)

        patch.setattr(LanguageTrainer, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            train(stopped)
    train(stopped)
    assert figures(tmp_path / "stopped") == figures(tmp_path / "whole")


def test_a_checkpoint_cut_short_is_passed_over(tmp_path: Path) -> None:
    for step, state in ((5, '{"global_step": 5}'), (10, '{"global_st')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-15").mkdir()
    found = last_checkpoint(tmp_path)
    assert found == tmp_path / "checkpoint-5"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_non_finite_numbers_stop_the_run_with_advice(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    step = LanguageTrainer.training_step

    def spoil(self: LanguageTrainer, *args: object, **kwargs: object) -> torch.Tensor:
        loss = step(self, *args, **kwargs)
        if self.state.global_step == 4 and broken == "gradient":
            next(self.model.parameters()).grad.fill_(torch.inf)
        if self.state.global_step == 4 and broken == "loss":
            self.guard.add_loss(torch.tensor(torch.nan))
        return loss

    monkeypatch.setattr(LanguageTrainer, "training_step", spoil)
    with pytest.raises(TrainingDiverged, match=r"(?s)stopped at step 5: .*smaller learning rate") as caught:
        train(tiny_recipe(corpus, tmp_path / "run"))
    assert caught.value.step == 5
    logged = [line["loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert caught.value.last_finite_loss == pytest.approx(logged[-1])
    assert len(logged) == 4


def test_a_wild_learning_rate_is_caught_by_itself(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged):
        train(tiny_recipe(corpus, tmp_path / "run", "train.lr=1e30", "train.grad_clip=0", "train.warmup=0"))


def test_bf16_and_gradient_checkpointing_train(corpus: Path, tmp_path: Path) -> None:
    train(tiny_recipe(corpus, tmp_path / "plain", "train.steps=4"))
    train(tiny_recipe(corpus, tmp_path / "saving", "train.steps=4", "train.gradient_checkpointing=true"))
    assert figures(tmp_path / "saving") == figures(tmp_path / "plain")
    train(tiny_recipe(corpus, tmp_path / "bf16", "train.steps=4", "train.dtype=bf16"))
    for line, exact in zip(figures(tmp_path / "bf16"), figures(tmp_path / "plain"), strict=True):
        if "loss" in line:
            assert line["loss"] == pytest.approx(exact["loss"], rel=0.02)


def test_accumulation_equals_one_large_batch(corpus: Path, tmp_path: Path) -> None:
    train(tiny_recipe(corpus, tmp_path / "large", "train.steps=4", "train.batch_size=4"))
    train(tiny_recipe(corpus, tmp_path / "small", "train.steps=4", "train.batch_size=2", "train.accumulate=2"))
    for large, small in zip(figures(tmp_path / "large"), figures(tmp_path / "small"), strict=True):
        assert small == pytest.approx(large, rel=1e-4)


def test_isolated_documents_reach_the_model_as_cu_seqlens(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    step = LanguageTrainer.training_step

    def look(self: LanguageTrainer, model: object, inputs: dict[str, torch.Tensor], *rest: object) -> torch.Tensor:
        seen.append(inputs["cu_seqlens"])
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(LanguageTrainer, "training_step", look)
    train(tiny_recipe(corpus, tmp_path / "run", "train.steps=2", "data.isolate_documents=true"))
    assert all(bounds[0] == 0 and bounds[-1] == 32 and 16 in bounds for bounds in seen)


@pytest.mark.slow
def test_comparisons_train_apart_with_as_many_parameters(corpus: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        corpus, tmp_path / "run", "train.steps=2", "compare=[{name: transformer, train.lr: 2e-3}, no_such_model]"
    )
    results = train_all(recipe)
    assert [r.model for r in results] == ["yaad", "transformer"]
    assert abs(results[1].parameters - results[0].parameters) <= 24
    assert read_recipe(tmp_path / "run/compare/transformer/recipe.yaml").train.lr == 2e-3


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_rows(corpus: Path, tmp_path: Path) -> None:
    train(tiny_recipe(corpus, tmp_path / "one", "train.batch_size=4"))
    file = tmp_path / "recipe.yaml"
    file.write_text(tiny_recipe(corpus, tmp_path / "two", "train.batch_size=2").to_yaml())
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*launch, "-m", "miras.cli", "train", str(file), "--no-report"], check=True, capture_output=True)
    for one, two in zip(figures(tmp_path / "one"), figures(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    results = [read_result(tmp_path / name) for name in ("one", "two")]
    assert results[1].loss == pytest.approx(results[0].loss, rel=1e-4)
    assert results[1].tokens == results[0].tokens
