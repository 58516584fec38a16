"""The commands from end to end."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from miras.cli import app, main
from tests.evals.tasks import write_multiple_choice
from tests.train.conftest import _one_thread, _own_cache, corpus, tiny_recipe  # noqa: F401

RUNNER = CliRunner()


@pytest.fixture
def recipe_file(corpus: Path, tmp_path: Path) -> Path:  # noqa: F811
    file = tmp_path / "recipe.yaml"
    file.write_text(tiny_recipe(corpus, tmp_path / "run").to_yaml())
    return file


def test_train_eval_generate_report(recipe_file: Path, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    trained = RUNNER.invoke(app, ["train", str(recipe_file), "train.steps=4", "train.lr=2e-3"], catch_exceptions=False)
    assert trained.exit_code == 0
    assert re.search(r"step 4/4 +train \d\.\d+ +validation \d", trained.output)
    assert "yaad writes:" in trained.output
    assert (tmp_path / "run/report.html").is_file()
    again = RUNNER.invoke(app, ["train", str(recipe_file), "train.steps=4", "train.lr=2e-3", "--no-report"])
    assert "step 4/4" not in again.output

    result = json.loads((tmp_path / "run/result.json").read_text())
    scored = RUNNER.invoke(app, ["eval", run, "--json"], catch_exceptions=False)
    score = json.loads(scored.output)
    assert score["loss"] == pytest.approx(result["loss"], rel=1e-6)
    assert score["tokens"] == result["validation_tokens"]
    (tmp_path / "other.txt").write_text("the king and the queen\n" * 20)
    other = RUNNER.invoke(app, ["eval", run, "--data", str(tmp_path / "other.txt")], catch_exceptions=False)
    assert re.search(r"perplexity +[\d.]+\nbits per byte +[\d.]+\ntokens +[\d,]+ \(460 bytes of", other.output)

    options = ["eval", run, "--stream", str(tmp_path / "other.txt"), "--json", "--block-size"]
    streamed = [json.loads(RUNNER.invoke(app, [*options, size], catch_exceptions=False).output) for size in ("7", "1000")]
    assert streamed[0]["text_bytes"] == 460
    assert streamed[0]["loss"] == pytest.approx(streamed[1]["loss"], rel=1e-5)
    both = RUNNER.invoke(app, ["eval", run, "--stream", "a.txt", "--data", "b.txt"])
    assert "give --data or --stream, not both" in str(both.exception)
    missing = RUNNER.invoke(app, ["eval", run, "--stream", str(tmp_path / "none.txt")])
    assert isinstance(missing.exception, FileNotFoundError)

    options = ["generate", run, "--prompt", "the king", "--max-new-tokens", "5"]
    texts = [
        RUNNER.invoke(app, [*options, *more], catch_exceptions=False).output
        for more in (["--seed", "1"], ["--seed", "1"], ["--greedy"])
    ]
    assert texts[0] == texts[1]
    assert all(text.startswith("the king") for text in texts)

    reported = RUNNER.invoke(app, ["report", run, "--out", str(tmp_path / "r.html")], catch_exceptions=False)
    assert reported.exit_code == 0
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")


def test_eval_tasks(recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    run, folder = str(tmp_path / "run"), tmp_path / "tasks"
    RUNNER.invoke(app, ["train", str(recipe_file), "train.steps=2", "--no-report"], catch_exceptions=False)
    write_multiple_choice(folder)
    options = ["eval", run, "--tasks", "questions", "--include-path", str(folder), "--limit", "4"]
    shown = RUNNER.invoke(app, [*options, "--json"], catch_exceptions=False)
    acc, acc_norm = json.loads(shown.stdout)["results"]
    assert (acc["task"], acc["metric"], acc["n"], acc_norm["metric"]) == ("questions", "acc", 4, "acc_norm")
    stored = json.loads((tmp_path / "run/evals.json").read_text())["questions"]
    assert stored["metrics"]["acc"]["value"] == acc["value"]
    assert stored["settings"]["limit"] == 4
    again = RUNNER.invoke(app, options, catch_exceptions=False)
    assert re.search(rf"questions +. +acc +. +{acc['value']:.4f} ", again.stdout)
    assert json.loads((tmp_path / "run/evals.json").read_text())["questions"] == stored
    both = RUNNER.invoke(app, [*options, "--data", "b.txt"])
    assert "give --tasks without --data and --stream" in str(both.exception)
    lengths = RUNNER.invoke(app, [*options, "--ruler-length", "4k"])
    assert "--ruler-length 4k" in str(lengths.exception)


def test_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = RUNNER.invoke(app, ["table", "--head-dim", "32"], catch_exceptions=False)
    assert re.search(r"gated_deltanet +Matrix +L2 +L2 +a head +GradientDescent +1, decayed +d\^2 +1,024 ", shown.output)
    page = RUNNER.invoke(app, ["table", "--markdown"], catch_exceptions=False)
    assert page.output.startswith("| model | memory | bias |")
    assert "| `deltanet` | Matrix | L2 | none |" in page.output


def test_explain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    arguments = ["explain", "yaad", "refresh=64", "bias.kind=Lp", "inputs.conv_size=0"]
    shown = RUNNER.invoke(app, arguments, catch_exceptions=False).output
    assert "  loss         l_t = 1/3 sum |e_t|^3\n" in shown
    assert "the window of 64" in shown
    assert "each silu(proj(x_t))" in shown
    assert "  path           " in shown
    assert "  not attention  the design has fast weights" in shown
    hybrid = RUNNER.invoke(app, ["explain", "yaad_h", "--head-dim", "8"], catch_exceptions=False).output
    assert "Layer 2/2" in hybrid
    assert "A head of 8 channels" in hybrid
    gpu = RUNNER.invoke(app, ["explain", "yaad", "--device", "cuda"], catch_exceptions=False).output
    assert re.search(r"not native +.*for CPUs, not for cuda", gpu)


@pytest.mark.parametrize(
    ("arguments", "path", "reason"),
    [
        (["yaad"], "triton", "its speed has not been measured"),
        (["yaad", "--head-dim", "48"], "triton", "its tiles need widths that are powers of two; keys of 48, values of 48"),
        (["titans_lmm", "--head-dim", "128"], "triton", "262144 numbers of state a head"),
        (["mamba2", "--head-dim", "512"], "fla", "its kernels take keys of up to 256 channels, not 1024"),
    ],
)
def test_explain_knows_the_widths(arguments: list[str], path: str, reason: str) -> None:
    """Those of a head's keys and values, on which the kernels of a GPU depend."""
    shown = RUNNER.invoke(app, ["explain", *arguments, "--device", "cuda"], catch_exceptions=False).output
    assert f"not {path} {reason}" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "none.yaml"], "no recipe at none.yaml"),
        (["train", "RECIPE", "train.lrr=1"], "unknown recipe key train.lrr; did you mean train.lr?"),
        (["train", "RECIPE", "model.name=yad"], "yad"),
        (["train", "RECIPE", "train.lr=1e30", "train.grad_clip=0", "train.warmup=0"], "smaller learning rate"),
        (["eval", "nowhere"], "no model in nowhere"),
        (["eval", "nowhere", "--data", "t.txt", "--limit", "1"], "--limit: only tasks read this; name them with --tasks"),
        (["eval", "nowhere", "--ruler-length", "x", "--download"], "--ruler-length, --download: only tasks read this"),
        (["eval", "nowhere", "--include-path", "."], "--include-path: only tasks read this"),
        (
            ["eval", "nowhere", "--tasks", "mine", "--include-path", "/no/folder"],
            "--include-path /no/folder: no such folder",
        ),
        (["eval", "nowhere", "--tasks", "ruler", "--ruler-length", "x"], "--ruler-length x must be whole numbers"),
        (["generate", "nowhere"], "no model in nowhere"),
        (["report", "nowhere"], "holds no finished run"),
        (["explain", "yad"], "no model 'yad'"),
        (["explain", "yad"], "did you mean 'yaad'?"),
        (["explain", "yaad", "refresh"], "override 'refresh' is not of the form key=value"),
        (["explain", "yaad", "bias.kind=Hubr"], "did you mean 'Huber'?"),
        (["explain", "yaad", "refreshh=1"], "a design has memory, bias"),
        (["explain", "yaad", "--device", "tpu"], "device='tpu'; allowed: 'cpu', 'cuda'"),
    ],
)
def test_errors_are_one_message(
    recipe_file: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_status:
        main([str(recipe_file) if argument == "RECIPE" else argument for argument in arguments])
    assert exit_status.value.code == 1
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


def test_help_names_the_commands() -> None:
    shown = subprocess.run([sys.executable, "-m", "miras.cli", "--help"], capture_output=True, text=True, check=True)
    for command in ("train", "eval", "generate", "convert", "report", "table", "explain", "bench"):
        assert command in shown.stdout
