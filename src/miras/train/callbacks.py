"""What watches a training run: the stop on non-finite numbers, speed and memory, the metrics file, the progress bar."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from array import array
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

ADVICE = """what to try, in this order:
  1. a smaller learning rate (train.lr={lower:.1e}) or a longer warm-up (train.warmup=0.1)
  2. stronger clipping (train.grad_clip=0.5)
  3. a steadier memory: anchor "initial", a smaller inner rate, refresh 16 or more (model.design.*)
  4. train.dtype=fp32, if this was bf16
The weights before this step are intact; the last checkpoint is in the run folder."""


class TrainingDiverged(RuntimeError):
    """The loss or the gradient stopped being finite.

    Attributes: step (1-based), loss, grad_norm, last_finite_loss (None if there was none), last_finite_step.
    """

    def __init__(
        self, step: int, loss: float, grad_norm: float, last_finite_loss: float | None, learning_rate: float
    ) -> None:
        self.step, self.loss, self.grad_norm = step, loss, grad_norm
        self.last_finite_loss = last_finite_loss
        last = "none before it" if last_finite_loss is None else f"the step before had loss {last_finite_loss:.4f}"
        super().__init__(
            f"training stopped at step {step}: loss {loss:.4g}, clipped gradient norm {grad_norm:.4g} ({last}); "
            + ADVICE.format(lower=learning_rate / 3)
        )


class FiniteGuard(TrainerCallback):
    """Raises TrainingDiverged before a step with a non-finite loss or gradient is taken."""

    def __init__(self) -> None:
        self.loss: torch.Tensor | None = None
        self.last_finite_loss: float | None = None

    def add_loss(self, loss: torch.Tensor) -> None:
        """Adds one micro-batch's share of the step's loss."""
        self.loss = loss.detach() if self.loss is None else self.loss + loss.detach()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Checks the step's loss and the norm of all gradients."""
        model: nn.Module = kwargs["model"]
        norm = float(torch.nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None))
        loss = float(self.loss) if self.loss is not None else 0.0
        self.loss = None
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingDiverged(state.global_step + 1, loss, norm, self.last_finite_loss, args.learning_rate)
        self.last_finite_loss = loss


class Speed(TrainerCallback):
    """Counts tokens, time inside training steps and peak memory (of the GPU, or of the process without one)."""

    def __init__(self, tokens_per_step: int) -> None:
        self.tokens_per_step = tokens_per_step
        self.seconds, self.steps, self.began, self.resumed_steps = 0.0, 0, 0.0, 0
        self.durations = array("d")

    @property
    def tokens_per_second(self) -> float:
        """Over all steps of this process."""
        return self.steps * self.tokens_per_step / self.seconds if self.seconds else 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Starts the count of peak memory."""
        reset_peak_memory()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Starts the clock."""
        self.began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stops the clock."""
        if torch.cuda.is_available() and not args.use_cpu:
            torch.cuda.synchronize()
        self.durations.append(time.perf_counter() - self.began)
        self.seconds += self.durations[-1]
        self.steps += 1


class MetricsLog(TrainerCallback):
    """Appends every training and evaluation log to a JSON-lines file; on resuming, drops lines after the checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keeps what the checkpoint knows of."""
        if state.is_world_process_zero:
            kept = [line for line in read_metrics(self.path) if line["step"] <= state.global_step]
            self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Appends one line."""
        logs: dict[str, float] = kwargs["logs"]
        if state.is_world_process_zero and ("loss" in logs or "eval_loss" in logs):
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class Progress(TrainerCallback):
    """A progress bar with the newest figures, and one plain line at every evaluation."""

    def __init__(self, label: str) -> None:
        self.label, self.bar, self.figures, self.began = label, None, {}, 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Opens the bar (only on a terminal)."""
        from tqdm.auto import tqdm

        self.began = time.monotonic()
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=self.label,
            unit="step",
            dynamic_ncols=True,
            disable=None if state.is_world_process_zero else True,
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Moves the bar."""
        if self.bar is not None:
            self.bar.update(1)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Shows the newest figures, and a line after an evaluation."""
        logs: dict[str, float] = kwargs["logs"]
        if self.bar is None or not state.is_world_process_zero:
            return
        self.figures |= logs
        if "loss" in logs:
            self.bar.set_postfix_str(f"loss {logs['loss']:.3f}, {logs['tokens_per_second']:,.0f} tokens/s")
        if "eval_loss" in logs:
            self.bar.write(self._line(state))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Closes the bar."""
        if self.bar is not None:
            self.bar.close()

    def _line(self, state: TrainerState) -> str:
        figures, elapsed = self.figures, time.monotonic() - self.began
        train = f"train {figures['loss']:.3f}  " if "loss" in figures else ""
        return (
            f"{self.label}  step {state.global_step}/{state.max_steps}  {train}validation {figures['eval_loss']:.3f} "
            f"(perplexity {figures['eval_perplexity']:.1f}, {figures['eval_bits_per_byte']:.3f} bits/byte)  "
            f"{figures['tokens_per_second']:,.0f} tokens/s  {elapsed / 60:.1f} min"
        )


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics file; a last line cut short by a kill is left out."""
    lines: list[dict[str, float]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def reset_peak_memory() -> None:
    """Starts a new count of peak memory where the system can; elsewhere it runs since the process began."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(use_cpu: bool) -> int:
    """Peak bytes: allocated on the GPU, or resident in the process if there is no GPU in use."""
    if torch.cuda.is_available() and not use_cpu:
        return torch.cuda.max_memory_allocated()
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
