"""Tasks of EleutherAI's lm-evaluation-harness: the package's own, and ones described by local files.

The Miras paper's Table 2 is wikitext, lambada_openai, piqa, hellaswag, winogrande, arc_easy, arc_challenge, social_iqa
and boolq, all without examples in the prompt.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import json
import logging
import random
import sys
import tempfile
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from miras.evals import bigbench
from miras.lm import MirasForCausalLM
from miras.train.corpus import not_fetched

try:
    import lm_eval
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from requests import RequestException
except ImportError as error:
    raise ImportError("tasks come from the package lm-eval: pip install torch-miras[harness]") from error

FILE = "evals.json"
SEED = 1234
UNLIMITED = 2**31  # tokens
RULER = ("niah_", "ruler")  # how the names of its tasks begin


@dataclass(frozen=True)
class Row:
    """One measure of one task on its first `n` documents.

    stderr  None where the harness knows none; chance  None where it is not the mean of 1 / choices
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int
    chance: float | None


# The harness' registry hides the class' type.
_HFLM: Any = HFLM


class HarnessModel(_HFLM):
    """A model and its tokenizer as the harness calls them.

    `block_size` tokens are the longest context; without it, a Miras model's has no end (its state is of constant size,
    so nothing is cut) and another model's is what its configuration says. Documents scored as a whole are cut into
    windows of `block_size`, or of the harness' 2048 for a Miras model, and the separator before them is not scored.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 16, block_size: int | None = None
    ) -> None:
        endless = isinstance(model, MirasForCausalLM)
        limit = block_size or (UNLIMITED if endless else None)
        own = copy.deepcopy(tokenizer)  # it gets a padding token
        super().__init__(pretrained=model, tokenizer=own, batch_size=batch_size, max_length=limit)
        self.window: int = block_size or (self._DEFAULT_MAX_LENGTH if endless else self.max_length)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """As the harness', which would score a separator that the tokenizer adds as if it were text."""
        before = self._max_length, self.add_bos_token
        self._max_length, self.add_bos_token = self.window, False
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self._max_length, self.add_bos_token = before


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 16,
    block_size: int | None = None,
    include: Path | None = None,
    ruler_lengths: Sequence[int] = (4096,),
) -> list[Row]:
    """Score the model on the named tasks or groups: the harness' own, `bigbench.TASKS`, or those of YAML files in `include`.

    limit          the first so many documents of each task
    ruler_lengths  tokens of RULER's samples

    All data is loaded before the model is called; figures are the same for any batch size and in every run.

    Raises:
        FileNotFoundError: a task's data is neither on this machine nor reachable, or bigbench is not fetched yet.
        ValueError: no such task, or a sample of RULER cannot fit `ruler_lengths`.
    """
    was_training = model.training
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, _harness_on_stderr():
        tokenizer.save_pretrained(folder)  # RULER reads it by path
        if any(task.startswith(RULER) for task in tasks):
            from miras.evals import ruler

            ruler.check(tasks, tokenizer, ruler_lengths)
        manager = _manager(tasks, include, {"tokenizer": folder, "max_seq_lengths": list(ruler_lengths)})
        loaded = [_load(manager, task) for task in tasks]
        examinee = HarnessModel(model, tokenizer, batch_size, block_size)
        for task in loaded:
            found: Any = evaluate(lm=examinee, task_dict=task, limit=limit)
            rows += _rows(found)
    model.train(was_training)
    return rows


def save(rows: Sequence[Row], folder: Path, settings: dict[str, Any]) -> Path:
    """Put the rows into evals.json in `folder`, in the place of older ones of the same tasks."""
    file = folder / FILE
    kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    new: dict[str, Any] = {}
    for row in rows:
        about = {"lm_eval": lm_eval.__version__, **settings}
        entry = new.setdefault(row.task, {"settings": about, "n": row.n, "metrics": {}})
        entry["metrics"][row.metric] = {"value": row.value, "stderr": row.stderr, "chance": row.chance}
    file.write_text(json.dumps(kept | new, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return file


def to_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as dictionaries."""
    return [asdict(row) for row in rows]


@contextlib.contextmanager
def _harness_on_stderr() -> Generator[None]:
    """What the harness and its libraries print goes to stderr, its warnings about how it was called nowhere."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)


def _manager(tasks: Sequence[str], include: Path | None, metadata: dict[str, Any]) -> TaskManager:
    """The harness' index of tasks, without its own thousands where local files name all that is asked for.

    Raises ValueError for names in neither.
    """
    folders = [] if include is None else [include]
    if any(task.startswith(bigbench.TASKS) for task in tasks):
        folders.append(bigbench.tasks_folder())
    paths: Any = [str(folder) for folder in folders]
    manager = TaskManager(include_path=paths, include_defaults=False, metadata=metadata)
    if not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=paths, metadata=metadata)
    for task in tasks:
        if task not in manager.all_tasks:
            near = difflib.get_close_matches(task, [*manager.all_tasks, *bigbench.TASKS], 3)
            hint = f"did you mean {' or '.join(near)}?" if near else "`lm_eval ls tasks` lists them"
            raise ValueError(f"the harness has no task {task!r}; {hint}")
    return manager


def _load(manager: TaskManager, name: str) -> Any:
    """The task or group with its data. The order of seeds is the harness' own."""
    random.seed(0)
    np.random.seed(0)
    try:
        loaded: Any = manager.load([name])
    except RequestException as error:  # Of what `datasets` loads from the hub it is never this one.
        raise FileNotFoundError(
            f"the data of task {name} could not be fetched ({error}). The harness fetches it in every run and keeps none of "
            "it: run this where that host can be reached, or without the task (RULER's are ruler_qa_squad, ruler_qa_hotpot)"
        ) from error
    except OSError as error:
        raise not_fetched(f"the data of task {name}", error) from error
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(SEED)
    return loaded


def _rows(found: dict[str, Any]) -> list[Row]:
    """The harness' results, task by task; a group's chance is its tasks' if they agree."""
    chances = {task: _chance(found, task) for task in found["configs"]}
    for group, children in found["group_subtasks"].items():
        shared = {chances.get(child) for child in children}
        chances[group] = shared.pop() if len(shared) == 1 else None
    rows: list[Row] = []
    for task, measures in found["results"].items():
        for key, value in measures.items():
            metric, _, filtered = key.partition(",")
            # RULER's -1 stands for a length without samples.
            if not filtered or metric.endswith("_stderr") or (metric.isdigit() and value == -1):
                continue
            stderr = measures.get(f"{metric}_stderr,{filtered}")
            label = metric if filtered == "none" else f"{metric} ({filtered})"
            chance = chances[task] if metric in ("acc", "acc_norm") else None
            known = float(stderr) if isinstance(stderr, (int, float)) else None
            rows.append(Row(task, label, float(value), known, int(measures["sample_len"]), chance))
    return rows


def _chance(found: dict[str, Any], task: str) -> float | None:
    """The mean of 1 / choices over the documents; None if the task is not multiple choice."""
    documents = found["samples"][task]
    # Mutual information asks for every choice twice.
    if found["configs"][task]["output_type"] != "multiple_choice" or "acc_mutual_info" in documents[0]["metrics"]:
        return None
    return sum(1 / len(document["arguments"]) for document in documents) / len(documents)
