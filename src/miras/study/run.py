"""One run: train a model on a task's examples, test it under every condition, and write down what it came to."""

from __future__ import annotations

import hashlib
import math
import platform
import statistics
import tempfile
import time
import traceback
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import PrinterCallback, TrainingArguments, set_seed
from transformers.trainer_callback import ProgressCallback

from miras.kernels.fused import compiled_from
from miras.study.config import ResourcesSection
from miras.study.flops import count_flops
from miras.study.model import build
from miras.study.plan import Run
from miras.tasks import Batch, Task
from miras.train.callbacks import FiniteGuard, Speed, TrainingDiverged, peak_memory
from miras.train.config import Optimisation
from miras.train.model import parameter_count
from miras.train.trainer import GuardedTrainer, optimiser_arguments

CURVE_POINTS = 50
TRAINING, VALIDATION, TEST = 0, 1, 2
"""Streams of random numbers, apart from one another for every seed."""


@dataclass(frozen=True)
class Row:
    """What a run came to; a run that failed is a row too.

    status      done | diverged (a loss or gradient was not finite) | failed (any other error)
    config      the run, as a dictionary
    examples    SHA-256 of all training inputs, in order: equal for runs that saw the same
    tokens      positions of all training inputs
    flops       of the matrix products of one training step, per token (see `count_flops`)
    curve       [step, training loss] along the way
    validation  metrics on draws that no test uses: what settings are selected by
    tests       [{"condition": ..., "settings": {...}, "metrics": {...}, "count": ...}]
    seconds     in training steps
    tokens_per_second   of a step that takes the median time
    """

    key: str
    status: str
    error: str = ""
    trace: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    commit: str = ""
    finished: str = ""
    device: str = ""
    versions: str = ""
    parameters: int = 0
    steps: int = 0
    tokens: int = 0
    examples: str = ""
    flops: float = 0.0
    curve: list[list[float]] = field(default_factory=list)
    validation: dict[str, float] = field(default_factory=dict)
    tests: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    peak_memory: int = 0


class Examples(IterableDataset[dict[str, Tensor]]):
    """A run's training batches, which depend on the task, the seed and the batch size alone; what was read is counted."""

    def __init__(self, task: Task, batch_size: int, steps: int, seed: int) -> None:
        self.task, self.batch_size, self.steps, self.seed = task, batch_size, steps, seed
        self.tokens, self.digest = 0, hashlib.sha256()

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rng = np.random.default_rng([self.seed, TRAINING])
        for _ in range(self.steps):
            batch = self.task.sample(self.batch_size, rng)
            self.tokens += batch.inputs.shape[0] * batch.inputs.shape[1]
            self.digest.update(batch.inputs.contiguous().numpy().tobytes())
            yield batch._asdict()


class TaskTrainer(GuardedTrainer):
    """The trainer on batches that come whole, with the task's own loss."""

    task: Task

    def get_train_dataloader(self) -> Any:
        """The batches as they are drawn."""
        dataset: Any = self.train_dataset
        return DataLoader(dataset, batch_size=None)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """The task's loss of the model's answers."""
        return self.task.loss(model(inputs["inputs"]), inputs["targets"])


def execute(run: Run, resources: ResourcesSection, commit: str = "") -> Row:
    """Train and test; every error becomes a row that says so."""
    torch.set_num_threads(resources.threads)
    row: dict[str, Any] = {
        "key": run.key,
        "config": asdict(run),
        "commit": commit,
        "versions": f"torch {torch.__version__}, Python {platform.python_version()}",
    }
    try:
        row |= {"status": "done", **_train_and_test(run, resources)}
    except TrainingDiverged as error:
        row |= {"status": "diverged", "error": str(error).split(";")[0], "steps": error.step}
    except Exception as error:
        message = str(error).splitlines()[0] if str(error) else ""
        row |= {"status": "failed", "error": f"{type(error).__name__}: {message}", "trace": traceback.format_exc()}
    return Row(**row, finished=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))


def _train_and_test(run: Run, resources: ResourcesSection) -> dict[str, Any]:
    task, steps, batch_size = Task.from_dict(run.task), run.train["steps"], run.train["batch_size"]
    set_seed(run.seed)
    model = build(task, run.design, run.size)
    flops = count_flops(model, task)
    examples = Examples(task, batch_size, steps, run.seed)
    with compiled_from(0 if resources.compile else None):
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(run, resources, task, model, examples, folder)
            trainer.train()
            memory = peak_memory(trainer.args.use_cpu)
        tested = test(run, task, model)
    speed = trainer.speed
    return {
        "device": _device(trainer.args),
        "parameters": parameter_count(model),
        "steps": trainer.state.global_step,
        "tokens": examples.tokens,
        "examples": examples.digest.hexdigest(),
        "flops": flops,
        "curve": [[entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry],
        "seconds": speed.seconds,
        "tokens_per_second": examples.tokens / len(speed.durations) / statistics.median(speed.durations),
        "peak_memory": memory,
        **tested,
    }


def make_trainer(
    run: Run, resources: ResourcesSection, task: Task, model: nn.Module, examples: Examples, folder: str
) -> TaskTrainer:
    """The Trainer of a run; on a GPU only if the run asks for one. Raises ValueError if there is none."""
    if resources.gpus and not torch.cuda.is_available():
        raise ValueError(
            f"resources.gpus is {resources.gpus:g}, and this machine has no CUDA device; set it to 0 for the CPU"
        )
    fields = Optimisation.__dataclass_fields__
    settings = Optimisation(**{key: value for key, value in run.train.items() if key in fields})
    use_cpu = not resources.gpus
    args = TrainingArguments(
        output_dir=folder,
        max_steps=run.train["steps"],
        per_device_train_batch_size=run.train["batch_size"],
        **optimiser_arguments(settings),
        save_strategy="no",
        eval_strategy="no",
        logging_steps=max(1, run.train["steps"] // CURVE_POINTS),
        logging_nan_inf_filter=False,
        seed=run.seed,
        data_seed=run.seed,
        use_cpu=use_cpu,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
    )
    args._n_gpu = min(args.n_gpu, 1)
    guard, speed = FiniteGuard(), Speed(0)
    trainer = TaskTrainer(model=model, args=args, train_dataset=examples, callbacks=[guard, speed])
    trainer.task, trainer.guard, trainer.speed = task, guard, speed
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer


def test(run: Run, task: Task, model: nn.Module) -> dict[str, Any]:
    """The trained model on validation draws and under every condition, also with the settings of `evaluate`.

    The examples depend on the seed and the condition alone, so they are the same for every model.
    """
    number, batch_size = run.train["num_tests"], run.train["batch_size"]
    conditions = task.tests()
    selected_on = task.validation()
    draws = selected_on.sample(number, np.random.default_rng([run.seed, VALIDATION]))
    validation = measure([model], selected_on, split(draws, batch_size))[0]
    variants = [_variant(run, task, model, design["design"]) for design in run.evaluate]
    found: list[dict[str, Any]] = []
    for name, tested in conditions.items():
        draws = tested.sample(number, np.random.default_rng([run.seed, TEST, zlib.crc32(name.encode())]))
        settings = [{}, *(item["settings"] for item in run.evaluate)]
        metrics = [*measure([model], tested, split(draws, batch_size)), *measure(variants, tested, split(draws, batch_size))]
        metrics[0] |= measure_references(tested, split(draws, batch_size))
        found += [
            {"condition": name, "settings": setting, "metrics": values, "count": number}
            for setting, values in zip(settings, metrics, strict=True)
        ]
    return {"validation": validation, "tests": found}


@torch.no_grad()
def measure(models: list[nn.Module], task: Task, batches: Iterable[Batch]) -> list[dict[str, float]]:
    """Each model's mean metrics; of several, also how far its outputs deviate from the first's: |o - o_1| / |o_1|, norms."""
    sums: list[dict[str, np.ndarray]] = [{} for _ in models]
    for batch in batches if models else ():
        reference = torch.empty(0)
        for model, total in zip(models, sums, strict=True):
            device = next(model.parameters()).device
            outputs = model.eval()(batch.inputs.to(device))
            reference = outputs if total is sums[0] else reference
            for name, pair in task.measure(outputs, batch.targets.to(device)).items():
                total[name] = total.get(name, np.zeros(2)) + np.asarray(pair, np.float64)
            moved, size = (outputs - reference).double().square().sum(), reference.double().square().sum()
            total["deviation"] = total.get("deviation", np.zeros(2)) + np.asarray([moved.item(), size.item()])
    found: list[dict[str, float]] = []
    for total in sums:
        deviation = total.pop("deviation")
        means = {name: float(pair[0] / pair[1]) for name, pair in total.items()}
        means |= task.derived(means)
        found.append(means | ({"deviation": math.sqrt(deviation[0] / deviation[1])} if len(models) > 1 else {}))
    return found


def measure_references(task: Task, batches: Iterable[Batch]) -> dict[str, float]:
    """The task's main metric of each of its references, as `reference_metric` names it."""
    answers, sums = task.references(), dict[str, np.ndarray]()
    for batch in batches if answers else ():
        for name, answer in answers.items():
            found = np.asarray(task.measure(answer(batch.inputs), batch.targets)[task.metric], np.float64)
            sums[name] = sums.get(name, np.zeros(2)) + found
    return {reference_metric(task, name): float(total[0] / total[1]) for name, total in sums.items()}


def reference_metric(task: Task, name: str) -> str:
    """What a run's metrics call the main metric of a reference."""
    return f"{task.metric} of {name}"


def split(batch: Batch, size: int) -> Iterator[Batch]:
    """A batch in parts of `size` examples."""
    yield from map(Batch, batch.inputs.split(size), batch.targets.split(size))


def _variant(run: Run, task: Task, model: nn.Module, design: Mapping[str, Any]) -> nn.Module:
    """The trained model with another design of the same parameters. Raises ValueError if they are not the same."""
    other = build(task, design, run.size).to(next(model.parameters()).device)
    try:
        other.load_state_dict(model.state_dict())
    except RuntimeError as error:
        raise ValueError(f"evaluate changes the model's parameters: {str(error).splitlines()[-1].strip()}") from error
    return other


def _device(args: TrainingArguments) -> str:
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}" if args.use_cpu else torch.cuda.get_device_name()
