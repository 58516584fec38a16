"""The Hugging Face Trainer as every run here uses it: AdamW by kind of parameter, a stop on non-finite numbers, speed."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer

from miras.train.callbacks import FiniteGuard, Speed
from miras.train.config import Optimisation
from miras.train.model import parameter_groups


class GuardedTrainer(Trainer):
    """The Trainer with AdamW groups by kind of parameter, a stop on non-finite numbers, and its speed in the logs."""

    guard: FiniteGuard
    speed: Speed
    model: Any

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW over `parameter_groups`."""
        if self.optimizer is None:
            cls, options = self.get_optimizer_cls_and_kwargs(self.args)
            named = (self.model if model is None else model).named_parameters()
            self.optimizer = cls(parameter_groups(named, self.args.learning_rate, self.args.weight_decay), **options)
        return self.optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-batch; its loss is kept for the guard."""
        loss = super().training_step(*args, **kwargs)
        self.guard.add_loss(loss)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the tokens seen and the speed to what is logged."""
        logs["train_seconds"] = self.speed.seconds
        logs["tokens"] = self.state.global_step * self.speed.tokens_per_step
        logs["tokens_per_second"] = self.speed.tokens_per_second
        super().log(logs, start_time)


def optimiser_arguments(settings: Optimisation) -> dict[str, Any]:
    """Keywords of TrainingArguments: AdamW, warm-up and a cosine to a fraction of the learning rate."""
    return {
        "learning_rate": settings.lr,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": settings.min_lr_ratio},
        "warmup_steps": settings.warmup,
        "weight_decay": settings.weight_decay,
        "adam_beta1": settings.betas[0],
        "adam_beta2": settings.betas[1],
        "max_grad_norm": settings.grad_clip,
        "bf16": settings.dtype == "bf16",
    }
