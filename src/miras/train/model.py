"""From a recipe's model section to a language model, of a wanted size if need be, and its optimiser groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from miras.train.config import ModelSection


def build_model(section: ModelSection, vocab_size: int, separator: int | None = None) -> PreTrainedModel:
    """The language model of a recipe, freshly initialised from torch's random state.

    Raises:
        ValueError: no such model, illegal overrides or keys of `extra`, or a `match_parameters` that no width can reach.
    """
    if section.match_parameters is not None:
        section = replace(section, intermediate_size=matching_width(section, vocab_size), match_parameters=None)
    return _language_model(section, vocab_size, separator)


def matching_width(section: ModelSection, vocab_size: int) -> int:
    """The intermediate size whose model has most nearly `match_parameters` parameters in all (see `width_for`)."""
    assert section.match_parameters is not None

    def count(width: int) -> int:
        return parameter_count(meta_model(replace(section, intermediate_size=width, match_parameters=None), vocab_size))

    return width_for(section.match_parameters, count, section)


def width_for(wanted: int, count: Callable[[int], int], section: ModelSection) -> int:
    """The feed-forward width at which `count`, affine in the width, comes nearest to `wanted` parameters.

    Large models get a multiple of 8, which GPUs multiply faster, where that costs less than a thousandth of the parameters.
    Raises ValueError if the model is larger than that without any feed-forward width.
    """
    low, high = count(64), count(128)
    slope = (high - low) / 64
    multiple = 8 if 4 * slope <= 1e-3 * wanted else 1
    width = multiple * round((64 + (wanted - low) / slope) / multiple) if slope > 0 else 0
    if width < 1:
        raise ValueError(
            f"{wanted:,} parameters are out of reach: {section.name} with hidden_size {section.hidden_size} and "
            f"{section.num_hidden_layers} layers has {int(low - 63 * slope):,} parameters at intermediate_size 1; use fewer "
            "layers or a smaller hidden_size"
        )
    return width


def meta_model(section: ModelSection, vocab_size: int) -> PreTrainedModel:
    """The model without storage: shapes and counts only."""
    with torch.device("meta"):
        return build_model(section, vocab_size)


def parameter_count(model: nn.Module) -> int:
    """The number of parameters, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """AdamW groups: weight decay for matrices that multiply activations, none for anything else.

    Without decay: parameters of one dimension (norms, biases, gate offsets), embeddings, the memories' initial
    weights (`memory.` in the name) and whatever carries `_no_weight_decay = True`. An attribute `_lr_scale`
    multiplies the learning rate. The first group has the plain learning rate, which is the one that gets logged.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            key = (float(getattr(parameter, "_lr_scale", 1.0)), has_weight_decay(name, parameter))
            groups.setdefault(key, []).append(parameter)
    ordered = sorted(groups, key=lambda key: (key[0] != 1.0, not key[1], key[0]))
    return [
        {"params": groups[scale, decays], "lr": lr * scale, "weight_decay": weight_decay if decays else 0.0}
        for scale, decays in ordered
    ]


def has_weight_decay(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies to this parameter (see `parameter_groups`)."""
    parts = name.split(".")
    return not (
        parameter.ndim < 2
        or getattr(parameter, "_no_weight_decay", False)
        or "memory" in parts[:-1]
        or parts[-1] == "bias"
        or any("norm" in part or part.startswith("embed") for part in parts)
    )


def _language_model(section: ModelSection, vocab_size: int, separator: int | None) -> PreTrainedModel:
    from miras import models
    from miras.lm import MirasConfig, MirasForCausalLM
    from miras.lm.config import further_arguments

    config = MirasConfig(
        design=models.named(section.name, **section.design),
        vocab_size=vocab_size,
        hidden_size=section.hidden_size,
        num_hidden_layers=section.num_hidden_layers,
        num_heads=section.num_heads,
        intermediate_size=section.intermediate_size,
        bos_token_id=separator,
        eos_token_id=separator,
        **further_arguments(section.extra),
    )
    return MirasForCausalLM(config)
