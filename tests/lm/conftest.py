"""Tiny models in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lm_cases import BLOCKS, DESIGNS

from miras.lm import MirasConfig, MirasForCausalLM

torch.set_num_threads(1)


@pytest.fixture
def build() -> Callable[..., MirasForCausalLM]:
    """A seeded model in float64 and eval mode, of a design or of its name in DESIGNS; keywords go to MirasConfig."""

    def make(design: Any, **kwargs: Any) -> MirasForCausalLM:
        torch.manual_seed(0)
        if isinstance(design, str):
            design, kwargs = DESIGNS[design], {**BLOCKS.get(design, {}), **kwargs}
        # Wide initial projections, so that every part makes a difference that shows.
        sizes = {"vocab_size": 23, "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 2, "initializer_range": 0.3}
        return MirasForCausalLM(MirasConfig(design=design, **{**sizes, **kwargs})).double().eval()

    return make
