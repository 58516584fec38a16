"""Models from recipes: parameter counts that match, and optimiser groups."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from miras.train.config import ModelSection
from miras.train.model import build_model, has_weight_decay, meta_model, parameter_count, parameter_groups

SECTION = ModelSection(hidden_size=16, num_hidden_layers=2, num_heads=2, intermediate_size=16)


@pytest.mark.parametrize("name", ["yaad", "gated_deltanet", "transformer"])
def test_match_parameters_comes_as_near_as_a_width_can(name: str) -> None:
    wanted = 40_000
    section = replace(SECTION, name=name, intermediate_size=None, match_parameters=wanted)
    count = parameter_count(meta_model(section, vocab_size=300))
    one_more = 3 * section.hidden_size * section.num_hidden_layers  # parameters of one more unit in every SwiGLU
    assert abs(count - wanted) <= one_more / 2


def test_match_parameters_out_of_reach_says_what_the_least_is() -> None:
    with pytest.raises(ValueError, match=r"out of reach: yaad .* at intermediate_size 1"):
        build_model(replace(SECTION, intermediate_size=None, match_parameters=100), vocab_size=300)


def test_unknown_models_and_overrides_are_refused() -> None:
    with pytest.raises(ValueError, match="yaad"):
        build_model(replace(SECTION, name="yad"), vocab_size=300)
    with pytest.raises(ValueError, match="refesh"):
        build_model(replace(SECTION, design={"refesh": 8}), vocab_size=300)


def test_design_overrides_and_extra_reach_the_model() -> None:
    section = replace(SECTION, design={"refresh": 8}, extra={"tie_word_embeddings": False})
    model = build_model(section, vocab_size=300, separator=7)
    assert model.config.design["refresh"] == 8
    assert not model.config.tie_word_embeddings
    assert (model.config.bos_token_id, model.config.eos_token_id) == (7, 7)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"tie_word_embedings": False}, r"'tie_word_embedings'; allowed: head_dim, .*did you mean 'tie_word_embeddings'\?"),
        ({"foo": 3}, r"extra has the key 'foo'; allowed: head_dim, .*pad_token_id$"),
        ({"hidden_size": 8}, r"'hidden_size'; allowed: .*says that elsewhere"),
    ],
)
def test_extra_holds_what_the_model_knows(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(replace(SECTION, extra=extra), vocab_size=300)


def test_the_same_seed_gives_the_same_model() -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(build_model(SECTION, vocab_size=300))
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))


def test_weight_decay_reaches_projections_only() -> None:
    model = build_model(replace(SECTION, extra={"tie_word_embeddings": False}), vocab_size=300)
    decayed = {name for name, parameter in model.named_parameters() if has_weight_decay(name, parameter)}
    assert "lm_head.weight" in decayed
    assert any(name.endswith("q_proj.weight") for name in decayed)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or ".memory." in name or "norm" in name or "embeddings" in name:
            assert name not in decayed, name


class Tower(nn.Module):
    """One parameter of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(4, 2)
        self.q_proj = nn.Linear(2, 2)
        self.attn_norm = nn.LayerNorm((2, 2))
        self.memory = nn.ParameterDict({"up": nn.Parameter(torch.zeros(1, 2, 2))})
        self.gate = nn.Parameter(torch.zeros(2, 2))
        self.gate._no_weight_decay = True  # type: ignore[attr-defined]
        self.fast = nn.Parameter(torch.zeros(2, 2))
        self.fast._lr_scale = 0.1  # type: ignore[attr-defined]
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)


def test_groups_hold_every_parameter_once() -> None:
    tower = Tower()
    groups = parameter_groups(tower.named_parameters(), lr=1.0, weight_decay=0.5)
    names = {id(p): name for name, p in tower.named_parameters()}
    found = [([names[id(p)] for p in g["params"]], g["lr"], g["weight_decay"]) for g in groups]
    plain = ["gate", "embeddings.weight", "q_proj.bias", "attn_norm.weight", "attn_norm.bias", "memory.up"]
    assert found == [(["q_proj.weight"], 1.0, 0.5), (plain, 1.0, 0.0), (["fast"], 0.1, 0.5)]
