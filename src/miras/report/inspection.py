"""What each memory does while it reads a passage: gates, its own loss before and after writing, distance travelled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

MEASURES = ("lr", "log_decay", "loss_before", "loss_after", "drift")


@dataclass(frozen=True)
class LayerTrace:
    """One memory layer's measures by name, each [T, H] (means over channels), and its name in the model."""

    name: str
    measures: dict[str, Tensor]


@dataclass(frozen=True)
class Inspection:
    """The traces of all memory layers on one passage, and notes on what could not be measured."""

    ids: list[int]
    layers: list[LayerTrace]
    notes: list[str]

    def surprise(self) -> Tensor | None:
        """How badly the memories predicted each token's value [T]: loss_before as a rank in 0..1, mean of layers."""
        losses = [layer.measures["loss_before"] for layer in self.layers if "loss_before" in layer.measures]
        if not losses:
            return None
        ranks = [loss.mean(1).argsort().argsort().float() / max(1, len(loss) - 1) for loss in losses]
        return torch.stack(ranks).mean(0)


@torch.no_grad()
def inspect_memory(model: PreTrainedModel, ids: list[int]) -> Inspection:
    """Run the model over `ids` and ask every layer that offers `inspect(hidden_states, shared)` for its measures.

    A layer that cannot be inspected becomes a note, not an error: a report should not fail on one figure.
    """
    layers: list[tuple[str, Any]] = [
        (name, module) for name, module in model.named_modules() if callable(getattr(module, "inspect", None))
    ]
    seen: dict[str, tuple[Any, ...]] = {}
    hooks = [module.register_forward_pre_hook(_keep(seen, name), with_kwargs=True) for name, module in layers]
    was_training = model.training
    try:
        model.eval()(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    traces: list[LayerTrace] = []
    notes: list[str] = [] if layers else ["this model has no layer that can be inspected"]
    for name, module in layers:
        if name not in seen:  # A part of a layer that offers it too.
            continue
        try:
            found = {key: _by_head(value) for key, value in module.inspect(*seen[name]).items() if key in MEASURES}
        except (NotImplementedError, ValueError, KeyError) as error:
            notes.append(f"{name}: {error}")
            continue
        if found:
            traces.append(LayerTrace(name, found))
    return Inspection(ids, traces, notes)


def _keep(seen: dict[str, tuple[Any, ...]], name: str) -> Any:
    def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        hidden = keywords["hidden_states"] if "hidden_states" in keywords else arguments[0]
        shared = keywords.get("shared")
        seen[name] = (hidden,) if shared is None else (hidden, shared)

    return hook


def _by_head(value: Tensor) -> Tensor:
    """[1, T, H] or [1, T, H, C] as [T, H] on the CPU."""
    value = value[0].detach().float().cpu()
    return value.mean(-1) if value.ndim == 3 else value
