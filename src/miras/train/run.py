"""One training run on the Hugging Face Trainer: run folder, exact resume, evaluation, results."""

from __future__ import annotations

import importlib.util
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments, set_seed

from miras.evals.perplexity import Score, score
from miras.evals.sample import write_text
from miras.train.callbacks import FiniteGuard, MetricsLog, Progress, Speed, peak_memory, read_metrics
from miras.train.config import Recipe
from miras.train.data import Prepared, prepare, separator_id
from miras.train.folder import METRICS, RESULT, Result, is_main, last_checkpoint, open_run, world_size
from miras.train.model import build_model, parameter_count
from miras.train.rows import Windows, stack
from miras.train.trainer import GuardedTrainer, optimiser_arguments

log = logging.getLogger("miras")


class LanguageTrainer(GuardedTrainer):
    """The trainer with exact perplexity as its evaluation."""

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss, perplexity and bits a byte over `Windows`, counted token by token."""
        windows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        result = self.score(windows)
        metrics = {f"eval_{key}": getattr(result, key) for key in ("loss", "perplexity", "bits_per_byte", "tokens")}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def score(self, windows: Windows) -> Score:
        """The model's score on `windows`, over all processes."""
        model: Any = self.model_wrapped if self.is_in_train else self.model
        gather: Any = self.accelerator.gather_for_metrics
        return score(model, self.get_eval_dataloader(windows), windows.bytes_per_token, gather)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Evaluation rows are stacked, whatever training does with documents."""
        collate, self.data_collator = self.data_collator, stack
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collate


def train(recipe: Recipe, overwrite: bool = False) -> Result:
    """Train, evaluate and save one model; go on from the last checkpoint if the run folder has one.

    Raises:
        ValueError: the run folder holds a run of another recipe (pass overwrite to replace it).
        TrainingDiverged: the loss or the gradient stopped being finite.
    """
    folder, settings = Path(recipe.out), recipe.train
    args = training_arguments(recipe)
    with args.main_process_first(desc="opening the run folder"):
        finished = open_run(folder, recipe, overwrite)
    if finished is not None:
        log.info("%s is finished: nothing to train (--overwrite trains it again)", folder)
        return finished
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    with args.main_process_first(desc="tokenising"):
        prepared = prepare(recipe.data)
    separator = separator_id(prepared.tokenizer)
    set_seed(settings.seed)
    model = build_model(recipe.model, len(prepared.tokenizer), separator)
    checkpoint = last_checkpoint(folder)
    trainer = make_trainer(recipe, args, prepared, model, checkpoint)
    log.info(
        "%s: %s parameters, %s steps of %s tokens%s",
        recipe.model.name,
        f"{parameter_count(model):,}",
        f"{args.max_steps:,}",
        f"{trainer.speed.tokens_per_step:,}",
        f", going on from {checkpoint.name}" if checkpoint else "",
    )
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return finish(trainer, recipe, prepared)


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """The Trainer's arguments for a recipe."""
    settings = recipe.train
    use_cpu = not torch.cuda.is_available()
    args = TrainingArguments(
        output_dir=recipe.out,
        max_steps=recipe.steps_for(world_size()),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        **optimiser_arguments(settings),
        activation_checkpointing=settings.gradient_checkpointing,
        eval_strategy="steps",
        eval_steps=settings.eval_every,
        save_strategy="steps",
        save_steps=settings.save_every,
        save_total_limit=settings.keep_checkpoints,
        logging_steps=settings.logging_every,
        logging_nan_inf_filter=False,
        seed=settings.seed,
        data_seed=settings.seed,
        use_cpu=use_cpu,
        dataloader_pin_memory=not use_cpu,
        remove_unused_columns=False,
        accelerator_config={"dispatch_batches": False},  # packed rows cannot be sliced along the batch
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        report_to="none",
    )
    if args.n_gpu > 1:
        log.info(
            "using one of %d GPUs; for all: torchrun --nproc-per-node %d -m miras.cli train ...",
            args.n_gpu,
            args.n_gpu,
        )
        args._n_gpu = 1
    return args


def make_trainer(
    recipe: Recipe,
    args: TrainingArguments,
    prepared: Prepared,
    model: PreTrainedModel,
    checkpoint: Path | None,
) -> LanguageTrainer:
    """The Trainer with everything that watches the run."""
    folder = Path(recipe.out)
    guard, speed = FiniteGuard(), Speed(recipe.tokens_per_step * world_size())
    if checkpoint is not None:
        done = int(checkpoint.name.split("-")[1])
        earlier = [line for line in read_metrics(folder / METRICS) if line["step"] <= done]
        speed.steps, speed.seconds = done, earlier[-1]["train_seconds"] if earlier else 0.0
    callbacks: list[TrainerCallback] = [
        guard,
        speed,
        MetricsLog(folder / METRICS),
        Progress(recipe.model.name),
    ]
    trainer = LanguageTrainer(
        model=model,
        args=args,
        train_dataset=prepared.train,
        eval_dataset=evaluation_rows(recipe, prepared, recipe.train.eval_tokens),
        data_collator=prepared.collate,
        processing_class=prepared.tokenizer,
        callbacks=callbacks + _tensorboard(folder),
    )
    trainer.guard, trainer.speed = guard, speed
    trainer.remove_callback(PrinterCallback)
    return trainer


def evaluation_rows(recipe: Recipe, prepared: Prepared, limit: int | None) -> Windows:
    """The held-out rows, about `limit` tokens of them."""
    data = recipe.data
    separator = separator_id(prepared.tokenizer)
    return Windows(prepared.validation, data.block_size, data.isolate_documents, separator, limit)


def finish(trainer: LanguageTrainer, recipe: Recipe, prepared: Prepared) -> Result:
    """Score every held-out token, write a sample, and save model, tokenizer and result in the run folder."""
    folder = Path(recipe.out)
    memory = peak_memory(trainer.args.use_cpu)
    total = trainer.score(evaluation_rows(recipe, prepared, None))
    trainer.save_model(str(folder))
    model = trainer.model
    assert isinstance(model, PreTrainedModel)
    result = Result(
        model=recipe.model.name,
        folder=str(folder),
        parameters=parameter_count(model),
        steps=trainer.state.global_step,
        tokens=trainer.state.global_step * trainer.speed.tokens_per_step,
        loss=total.loss,
        perplexity=total.perplexity,
        bits_per_byte=total.bits_per_byte,
        validation_tokens=total.tokens,
        validation_documents=prepared.validation.names,
        tokens_per_second=trainer.speed.tokens_per_second,
        peak_memory=memory,
        seconds=trainer.speed.seconds,
        seed=recipe.train.seed,
        device=_device_name(trainer.args),
        sample=write_text(model, prepared.tokenizer, seed=recipe.train.seed, **asdict(recipe.sample)),
    )
    if is_main():
        (folder / RESULT).write_text(json.dumps(asdict(result), indent=2), encoding="utf-8")
    return result


def _tensorboard(folder: Path) -> list[TrainerCallback]:
    """A TensorBoard writer in the run folder, if tensorboard is installed."""
    if importlib.util.find_spec("tensorboard") is None or not is_main():
        return []
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations.integration_utils import TensorBoardCallback

    return [TensorBoardCallback(SummaryWriter(str(folder / "tensorboard")))]


def _device_name(args: TrainingArguments) -> str:
    if args.use_cpu:
        return f"CPU, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    return torch.cuda.get_device_name()
