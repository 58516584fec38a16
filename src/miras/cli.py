"""The command line: `miras train`, `eval`, `generate`, `convert`, `report`, `study`, `table`, `explain` and `bench`."""

from __future__ import annotations

import itertools
import json
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from miras.train.folder import Result

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Sequence models as associative memories that learn at test time.",
)

Checkpoint = Annotated[Path, typer.Argument(help="A run folder, a checkpoint in it, or any saved model folder.")]


HeadDim = Annotated[int, typer.Option(help="Channels of the head whose sizes are given.", min=1)]


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, for example recipes/quickstart.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example train.lr=3e-4.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the run in the recipe's folder.")] = False,
    report: Annotated[bool, typer.Option(help="Write report.html at the end.")] = True,
    quiet: Annotated[bool, typer.Option("--quiet", help="No table and no sample at the end.")] = False,
) -> None:
    """Train a recipe's model and the ones it is compared with. The same command goes on after a kill."""
    from miras.train.compare import train_all
    from miras.train.config import read_recipe
    from miras.train.folder import is_main

    _set_up()
    results = train_all(read_recipe(recipe, overrides or []), overwrite)
    if not is_main():
        return
    if report:
        _write_report([Path(r.folder) for r in results], Path(results[0].folder) / "report.html")
    if not quiet:
        _print_results(results)


@app.command("eval")
def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[str | None, typer.Option(help="Score all of this corpus instead of the held-out text.")] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens of context (default: as in training).")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows at a time.")] = 16,
    stream: Annotated[
        Path | None, typer.Option(help="Score this text file as one document, in blocks of block-size.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-evaluation-harness, by commas, in its place.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many documents of each task.", min=1)] = None,
    include_path: Annotated[Path | None, typer.Option(help="A folder with tasks of your own, as YAML files.")] = None,
    ruler_length: Annotated[str | None, typer.Option(help="Tokens of RULER's samples, by commas (default: 4096).")] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch the bigbench tasks first (358 MB).")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print loss, perplexity and bits a byte on held-out text, or the scores of tasks."""
    from miras.evals.checkpoint import evaluate_checkpoint, evaluate_text

    _set_up()
    own = {"--limit": limit, "--include-path": include_path, "--ruler-length": ruler_length, "--download": download or None}
    _check_options(tasks, data, stream, [name for name, value in own.items() if value is not None])
    if tasks is not None:
        settings = {"limit": limit, "block_size": block_size}
        _evaluate_tasks(checkpoint, tasks, settings, batch_size, include_path, _lengths(ruler_length), download, as_json)
        return
    model, tokenizer = _load(checkpoint)
    if stream is not None:
        data = str(stream)
        score = evaluate_text(model, tokenizer, stream, block_size or 2048)
    else:
        score = evaluate_checkpoint(checkpoint, model, tokenizer, data, block_size, batch_size)
    if as_json:
        print(json.dumps(score.to_dict() | {"checkpoint": str(checkpoint), "data": data or "held out"}))
        return
    print(f"loss           {score.loss:.4f} nats a token")
    print(f"perplexity     {score.perplexity:.2f}")
    print(f"bits per byte  {score.bits_per_byte:.4f}")
    print(f"tokens         {score.tokens:,} ({score.text_bytes:,.0f} bytes of {data or 'held-out text'})")


@app.command()
def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Option(help="The text to go on from.")] = "",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write.")] = 200,
    temperature: Annotated[float, typer.Option(help="Below 1 the likelier tokens gain.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens with this probability in all.")] = 0.95,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the likeliest token.")] = False,
    seed: Annotated[int | None, typer.Option(help="For the same text every time.")] = None,
) -> None:
    """Write text, token by token as it comes."""
    from transformers import TextStreamer

    from miras.evals.sample import write_text

    _set_up()
    model, tokenizer = _load(checkpoint)
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    write_text(model, tokenizer, prompt, max_new_tokens, temperature, top_p, greedy, seed, streamer)


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="The folder of a flash-linear-attention checkpoint.")],
    out: Annotated[Path, typer.Argument(help="The folder to write the Miras model to.")],
) -> None:
    """Turn an fla checkpoint (GLA, RetNet, DeltaNet, Gated DeltaNet, RWKV-7, Mamba2) into a Miras model."""
    from miras.lm.fla import convert_folder

    _set_up()
    model = convert_folder(checkpoint, out)
    print(f"{out}: {model.num_parameters():,} parameters, {model.config.num_hidden_layers} layers")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Finished run folders, the main one first.")],
    out: Annotated[Path | None, typer.Option(help="The HTML file (default: report.html in the first run).")] = None,
) -> None:
    """Write one self-contained HTML report about finished runs; a run's own comparisons are found by themselves."""
    _set_up()
    others = sorted(path.parent for path in runs[0].glob("compare/*/result.json"))
    _write_report([*runs, *(path for path in others if path not in runs)], out or runs[0] / "report.html")


@app.command()
def study(
    file: Annotated[Path, typer.Argument(help="A study, for example recipes/studies/recall.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example seeds=[0] train.steps=50.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="Only this task; may be repeated.")] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="Only this model, or `model: label` of its ablations; may be repeated.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Its folder (default: the file's `out`).")] = None,
    address: Annotated[str | None, typer.Option(help="A Ray cluster; default: the cores of this machine.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Runs at a time (default: all that fit); 0: in this process, without Ray.")
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Repeat the runs that failed or diverged.")] = False,
    report_only: Annotated[bool, typer.Option("--report-only", help="Train nothing: report on the runs there are.")] = False,
) -> None:
    """Train every run of a study that is not done yet, and report: tables, tests, figures. Kill and repeat it at will."""
    from miras.study.ablation import check_ablations
    from miras.study.config import read_study, restricted
    from miras.study.page import write_study_report
    from miras.study.plan import check_heatmaps, check_tasks
    from miras.study.runner import run_study

    _set_up()
    whole = read_study(file, [*(overrides or []), *([f"out={out}"] if out else [])])
    check_heatmaps(whole)
    what = restricted(whole, task or [], model or [])
    check_tasks(what)
    check_ablations(what)
    parts = [("--task", name) for name in task or []] + [("--model", name) for name in model or []]
    parts += [("--out", str(out))] if out else []
    if not report_only:
        run_study(what, address, workers, retry)
    page, markdown = write_study_report(
        what, shlex.join(["miras", "study", str(file), *(overrides or []), *itertools.chain(*parts)])
    )
    print(f"report: {page} and {markdown}")


@app.command()
def table(
    head_dim: HeadDim = 64,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print GitHub Markdown.")] = False,
) -> None:
    """Print every named model as its four choices, with its state, its FLOPs a token and the path that runs it."""
    from rich.console import Console

    from miras.table import markdown, rows, terminal

    if as_markdown:
        print(markdown(rows(head_dim)))
        return
    console = Console()
    console.print(terminal(rows(head_dim), head_dim, console.width))


@app.command()
def explain(
    model: Annotated[str, typer.Argument(help="A named model, for example yaad.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example refresh=64 bias.kind=Lp.")] = None,
    head_dim: HeadDim = 64,
    device: Annotated[str, typer.Option(help="What the path is chosen for: cpu or cuda.")] = "cpu",
) -> None:
    """Print a model's recurrence in symbols with its sources, the path that runs it and why faster ones refuse."""
    from rich.console import Console

    from miras.choice import require_one_of
    from miras.describe import describe_named
    from miras.sections import read_overrides

    require_one_of("device", device, ("cpu", "cuda"))
    console = Console()
    text = describe_named(model, read_overrides(overrides or []), head_dim, console.width, device)
    for line in text.splitlines():
        style = "dim" if line.lstrip().startswith("Source:") else "" if line.startswith(" ") else "bold"
        console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="A named model, for example yaad.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value of its design, for example bias.kind=L2.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences.")] = 2,
    tokens: Annotated[str, typer.Option(help="Tokens of each; several lengths by commas.")] = "2048",
    heads: Annotated[int, typer.Option(help="Heads.")] = 4,
    head_dim: Annotated[int, typer.Option(help="Width of a head.")] = 64,
    refresh: Annotated[str | None, typer.Option(help="Refresh windows by commas (default: the model's).")] = None,
    mode: Annotated[str, typer.Option(help="By commas: forward, forward+backward, decode.")] = "forward,forward+backward",
    peers: Annotated[
        str,
        typer.Option(
            help="floor, ttt-mlp, titans-pytorch, titans-by-token, sdpa, delta-rule, fla-op (what --path fla calls, alone)."
        ),
    ] = "floor,ttt-mlp,sdpa",
    path: Annotated[list[str] | None, typer.Option(help="A path of the engine to measure too; may be repeated.")] = None,
    dtype: Annotated[str, typer.Option(help="Of q, k and v.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads (default: PyTorch's).")] = None,
    repeats: Annotated[int, typer.Option(help="Times that each is measured, in turn.")] = 5,
    memory: Annotated[bool, typer.Option(help="Measure peak memory, each in a process of its own.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw them into this file (.png, .svg, .pdf).")] = None,
) -> None:
    """Measure a memory: time, FLOP rate and peak memory, beside its bare matrix products and other people's code."""
    from miras.bench.command import run_bench

    run_bench(
        model,
        overrides or [],
        batch=batch,
        tokens=tokens,
        heads=heads,
        head_dim=head_dim,
        refresh=refresh,
        mode=mode,
        peers=peers,
        paths=path or [],
        dtype=dtype,
        device=device,
        threads=threads,
        repeats=repeats,
        memory=memory,
        json_file=json_file,
        plot_file=plot,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script: errors that a user can mend are one message on stderr and exit status 1."""
    try:
        app(args=list(arguments) if arguments is not None else None)
    except Exception as error:
        # What the library says to its users are these types and its own; anything else is a bug and keeps its trace.
        if not isinstance(error, (ValueError, FileNotFoundError, FileExistsError, ImportError)) and not _is_ours(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def _is_ours(error: Exception) -> bool:
    return type(error).__module__.startswith("miras.")


def _set_up() -> None:
    """Our own messages on stderr, as plain lines; only errors from the libraries beneath."""
    from transformers.utils import logging as hf_logging

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.getLogger("miras").handlers = [handler]
    logging.getLogger("miras").setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()


def _load(checkpoint: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    import transformers

    from miras.train.data import load_tokenizer

    if not (checkpoint / "config.json").is_file():
        raise FileNotFoundError(f"no model in {checkpoint} (config.json is missing); give a finished run's folder")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(str(checkpoint))
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), load_tokenizer(checkpoint)


def _check_options(tasks: str | None, data: str | None, stream: Path | None, of_tasks: list[str]) -> None:
    """Refuse options of `eval` that nothing would read; `of_tasks` are those given that belong to --tasks."""
    if tasks is not None and (stream is not None or data is not None):
        raise ValueError("give --tasks without --data and --stream: tasks bring their own text")
    if tasks is None and of_tasks:
        raise ValueError(f"{', '.join(of_tasks)}: only tasks read this; name them with --tasks, or leave it out")
    if stream is not None and data is not None:
        raise ValueError("give --data or --stream, not both: a stream is one text file, scored as one document")


def _lengths(given: str | None) -> list[int]:
    lengths = ["4096"] if given is None else given.split(",")
    if not all(length.strip().isdigit() for length in lengths):
        raise ValueError(f"--ruler-length {given} must be whole numbers of tokens, by commas, for example 4096,8192")
    return [int(length) for length in lengths]


def _evaluate_tasks(
    checkpoint: Path,
    tasks: str,
    settings: dict[str, int | None],
    batch_size: int,
    include: Path | None,
    ruler_lengths: list[int],
    download: bool,
    as_json: bool,
) -> None:
    """Run the harness, store the figures beside the checkpoint and print them."""
    from rich.console import Console
    from rich.table import Table

    from miras.evals import bigbench, harness

    if include is not None and not include.is_dir():
        raise FileNotFoundError(f"--include-path {include}: no such folder; give the one with your tasks' YAML files")
    model, tokenizer = _load(checkpoint)
    if download:
        logging.getLogger("miras").info(f"fetching bigbench {bigbench.VERSION}: {bigbench.MEGABYTES} MB from PyPI")
        bigbench.fetch()
    names = [name.strip() for name in tasks.split(",")]
    own = {"batch_size": batch_size, "include": include, "ruler_lengths": ruler_lengths}
    options: dict[str, Any] = {**settings, **own}
    rows = harness.run_tasks(model, tokenizer, names, **options)
    file = harness.save(rows, checkpoint, settings)
    if as_json:
        print(json.dumps({"checkpoint": str(checkpoint), "results": harness.to_json(rows)}))
        return
    table = Table(title=f"Tasks (stored in {file})")
    for name in ("task", "metric", "value", "stderr", "n", "chance"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for row in rows:
        figures = ["" if x is None else f"{x:.4f}" for x in (row.value, row.stderr, row.chance)]
        table.add_row(row.task, row.metric, *figures[:2], f"{row.n:,}", figures[2])
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _write_report(runs: list[Path], out: Path) -> None:
    from miras.report import write_report

    write_report(runs, out)
    print(f"report: {out}")


def _print_results(results: Sequence[Result]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Held-out text")
    columns: list[tuple[str, Any]] = [
        ("model", lambda r: r.model),
        ("parameters", lambda r: f"{r.parameters:,}"),
        ("tokens", lambda r: f"{r.tokens:,}"),
        ("loss", lambda r: f"{r.loss:.3f}"),
        ("ppl", lambda r: f"{r.perplexity:.1f}"),
        ("bits/byte", lambda r: f"{r.bits_per_byte:.3f}"),
        ("tokens/s", lambda r: f"{r.tokens_per_second:,.0f}"),
        ("peak MB", lambda r: f"{r.peak_memory / 1e6:,.0f}"),
    ]
    for name, _ in columns:
        table.add_column(name, justify="left" if name == "model" else "right")
    for result in results:
        table.add_row(*(show(result) for _, show in columns))
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(table)
    console.print(f"[bold]{results[0].model} writes:[/bold]")
    console.print(results[0].sample, markup=False, highlight=False)


if __name__ == "__main__":
    main()
