"""Hugging Face behaviour: configuration, saving and loading, initial values, tied embeddings, the loss."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lm_cases import ATTENTION, DESIGNS, HUBER, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from miras import models
from miras.bias import L2
from miras.design import Design, Pattern
from miras.inputs import Inputs
from miras.layer import MemoryLayer
from miras.learning import MultiStep
from miras.lm import MirasConfig, MirasForCausalLM, MirasModel
from miras.memory import MLP
from miras.retention import L2 as Decay

Build = Callable[..., MirasForCausalLM]
every_design = pytest.mark.parametrize("name", DESIGNS)
SIZES: dict[str, Any] = {"vocab_size": 23, "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 2}


@every_design
def test_save_and_load(name: str, build: Build, tmp_path: Path) -> None:
    model, x = build(name), tokens(2, 9)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert isinstance(again, MirasForCausalLM)
    assert again.config.arrangement == DESIGNS[name]
    for (key, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    torch.testing.assert_close(again(x).logits, model(x).logits, rtol=0, atol=1e-12)
    assert again.lm_head.weight is again.model.embeddings.weight
    backbone = AutoModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert isinstance(backbone, MirasModel)
    torch.testing.assert_close(backbone(x).last_hidden_state, model.model(x).last_hidden_state, rtol=0, atol=1e-12)


@every_design
def test_config_round_trip(name: str, tmp_path: Path) -> None:
    config = MirasConfig(design=DESIGNS[name], **SIZES)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, MirasConfig)
    assert again.arrangement == DESIGNS[name]
    changed = {key for key, value in again.to_dict().items() if value != config.to_dict().get(key)}
    assert changed <= {"_name_or_path"}
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "miras"
    other = AutoConfig.from_pretrained(tmp_path, design=HUBER)
    assert other.arrangement == HUBER
    assert other.to_dict()["design"] == HUBER.to_dict()


def test_config_defaults() -> None:
    config = MirasConfig(**SIZES)
    assert config.arrangement == models.yaad()
    assert (config.head_dim, config.intermediate_size) == (8, 64)
    assert MirasConfig(**{**SIZES, "num_attention_heads": 4, "num_heads": 4}).num_heads == 4
    hybrid = MirasConfig(design=Pattern((HUBER, ATTENTION)), **{**SIZES, "num_hidden_layers": 3})
    assert [hybrid.layer_design(i) for i in range(3)] == [HUBER, ATTENTION, HUBER]
    assert MirasConfig(design=HUBER.to_dict(), **SIZES).arrangement == HUBER


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"num_heads": 3}, ValueError, "hidden_size=16 is not divisible by num_heads=3"),
        ({"design": "yaad"}, TypeError, "design must be a miras Design"),
        ({"design": {"kind": "Desing"}}, ValueError, "did you mean 'Design'"),
        ({"num_layers": 3}, TypeError, "did you mean 'num_hidden_layers'"),
        ({"hidden_size": 0}, ValueError, "hidden_size=0; must be a positive integer"),
        ({"hidden_size": 16.0}, TypeError, "hidden_size=16.0; must be a positive integer"),
        ({"hidden_ratio": -1}, ValueError, "hidden_ratio=-1; must be positive"),
    ],
)
def test_config_errors(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MirasConfig(**{**SIZES, **changed})


@every_design
def test_initial_values(name: str) -> None:
    """Hugging Face's initialisation leaves what a design asks for."""
    torch.manual_seed(0)
    model = MirasForCausalLM(MirasConfig(design=DESIGNS[name], **{**SIZES, "hidden_size": 64}))
    for attn in (module for module in model.modules() if isinstance(module, MemoryLayer)):
        design = attn.design
        assert abs(float(attn.q_proj.weight.detach().std()) - 64**-0.5) < 0.1 * 64**-0.5
        if not design.parametric:
            if design.learning.persistent:
                assert 0.7 < float(attn.persistent.tokens.detach().std()) < 1.3
                assert attn.persistent.tokens._no_weight_decay
            continue
        key_dim, value_dim = design.inputs.features.widths(attn.key_dim, attn.value_dim)
        for weight in attn.memory.shapes:
            spread = 0.0 if weight in design.memory.offsets else design.inputs.weight_std * key_dim**-0.5
            linked = design.link(attn.memory.weights()[weight])
            assert abs(float(linked.detach().std()) - spread) < 0.1 * spread + 1e-9
        for slow in attn.memory.slow:
            value = design.inputs.norm_gain * value_dim**-0.5 if slow.endswith("weight") else 0.0
            assert bool((attn.memory.weights()[slow] == value).all())
        expected = design.inputs.rate.parameters(attn.b_proj.shape)
        assert set(dict(attn.b_proj.named_parameters(recurse=False))) == set(expected)
        if "bias" in expected:
            torch.testing.assert_close(attn.b_proj.bias.detach(), expected["bias"])
        assert all(p._no_weight_decay for p in attn.memory.parameters())


@pytest.mark.parametrize("steps", [1, 2])
def test_aligned_projections_start_equal_and_load_as_trained(steps: int, tmp_path: Path) -> None:
    inputs = Inputs(aligned=True)
    design = Design(MLP(), L2(), Decay(), MultiStep(steps), inputs=inputs)
    model = MirasForCausalLM(MirasConfig(design=design, **SIZES))
    for layer in model.model.layers:
        q, k = layer.attn.q_proj.weight, layer.attn.k_proj.weight
        assert torch.equal(q, k[: q.shape[0]])
        assert q.detach().std() > 0
    with torch.no_grad():
        model.model.layers[0].attn.q_proj.weight.add_(1.0)
    model.save_pretrained(tmp_path)
    loaded = MirasForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.model.layers[0].attn.q_proj.weight, model.model.layers[0].attn.q_proj.weight)
    free = MirasForCausalLM(MirasConfig(design=replace(design, inputs=Inputs()), **SIZES)).model.layers[0].attn
    assert not torch.equal(free.q_proj.weight, free.k_proj.weight[: free.q_proj.out_features])


def test_missing_weights_get_their_initial_values(build: Build, tmp_path: Path, caplog: Any) -> None:
    model = build(DESIGNS["huber"])
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    gone = [key for key in stored if "memory." in key or "b_proj.bias" in key or "conv1d" in key]
    save_file({key: x for key, x in stored.items() if key not in gone}, tmp_path / "model.safetensors", {"format": "pt"})
    with caplog.at_level(logging.ERROR):
        again, info = MirasForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == set(gone)
    attn, inputs = again.model.layers[0].attn, DESIGNS["huber"].inputs
    unit = attn.head_dim**-0.5
    assert 0.8 < attn.memory.up.std() / (inputs.weight_std * unit) < 1.2
    torch.testing.assert_close(attn.memory.norm_weight.mean().item(), inputs.norm_gain * unit, rtol=1e-6, atol=0)
    rate = inputs.rate.parameters((2,))["bias"]
    torch.testing.assert_close(attn.b_proj.bias.detach(), rate, check_dtype=False)
    assert 0.2 < attn.q_conv1d.weight.std() < 0.4
    assert attn.memory.up._no_weight_decay
    assert attn.b_proj.bias._no_weight_decay
    torch.testing.assert_close(again.lm_head.weight.double(), model.lm_head.weight)


@pytest.mark.parametrize("name", ["hybrid", "mac", "mag"])
def test_half_precision_keeps_the_memory_in_float32(name: str, build: Build, tmp_path: Path) -> None:
    build(DESIGNS[name]).float().save_pretrained(tmp_path)
    model = MirasForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    attn = next(module for module in model.modules() if isinstance(module, MemoryLayer))
    assert attn.memory.up.dtype == torch.float32
    assert attn.q_proj.weight.dtype == torch.bfloat16
    x = tokens(2, 9)
    out = model(x, labels=x)
    assert out.logits.dtype == torch.bfloat16
    assert bool(out.loss.isfinite())
    whole = MirasForCausalLM.from_pretrained(tmp_path)(x).logits
    assert (out.logits.float() - whole).std() < 0.1 * whole.std()
    assert model.generate(x, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 12)


@pytest.mark.parametrize("name", ["hybrid", "mac", "mag"])
def test_autocast(name: str, build: Build) -> None:
    model, x = build(DESIGNS[name]).float(), tokens(2, 9)
    exact = model(x).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x, labels=x)
    out.loss.backward()
    assert (out.logits.float() - exact).std() < 0.1 * exact.std()


def test_tied_and_untied_embeddings(build: Build) -> None:
    tied, untied = build(HUBER), build(HUBER, tie_word_embeddings=False)
    assert tied.lm_head.weight is tied.get_input_embeddings().weight
    assert untied.lm_head.weight is not untied.get_input_embeddings().weight
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 23 * 16
    tied.resize_token_embeddings(30)
    assert tied(tokens(1, 4)).logits.shape == (1, 4, 30)


def test_labels_are_shifted(build: Build) -> None:
    model, x = build(HUBER), tokens(2, 9)
    labels = x.clone()
    labels[0, 4:6] = -100
    out = model(x, labels=labels)
    want = F.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, want)
    total = model(x, labels=labels, num_items_in_batch=torch.tensor(7)).loss
    torch.testing.assert_close(total, want * (16 - 2) / 7)


@pytest.mark.parametrize("form", ["cu_seqlens", "cu_seq_lens_q", "position_ids"])
def test_packed_labels_do_not_cross_sequences(form: str, build: Build) -> None:
    model, x = build(HUBER), tokens(1, 9)
    bounds = torch.tensor([0, 4, 9])
    positions = torch.cat((torch.arange(4), torch.arange(5)))[None]
    said = {form: positions if form == "position_ids" else bounds}
    loss = model(x, labels=x, num_items_in_batch=1, **said).loss
    parts = [model(x[:, a:b], labels=x[:, a:b], num_items_in_batch=1).loss for a, b in ((0, 4), (4, 9))]
    torch.testing.assert_close(loss, sum(parts))


def test_outputs(build: Build) -> None:
    model, x = build(DESIGNS["hybrid"]), tokens(2, 9)
    mask = torch.ones_like(x)
    mask[0, :4] = 0
    out = model(x, attention_mask=mask, output_hidden_states=True, use_cache=False)
    assert out.past_key_values is None
    assert [tuple(h.shape) for h in out.hidden_states] == [(2, 9, 16)] * 3
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)
    kept = model(x, logits_to_keep=2)
    torch.testing.assert_close(kept.logits, model(x).logits[:, -2:])
    torch.testing.assert_close(model(x, logits_to_keep=torch.tensor([1, 3])).logits, model(x).logits[:, [1, 3]])
    assert isinstance(model(x, return_dict=False), tuple)
    assert model(x).past_key_values is not None
    assert model.train()(x).past_key_values is None
    embedded = model.eval()(inputs_embeds=model.get_input_embeddings()(x))
    torch.testing.assert_close(embedded.logits, model(x).logits)


def test_misuse(build: Build) -> None:
    model, x = build(HUBER), tokens(2, 9)
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        model()
    with pytest.raises(ValueError, match="no attention weights"):
        model(x, output_attentions=True)
    with pytest.raises(ValueError, match="batch must be 1"):
        model(x, cu_seqlens=torch.tensor([0, 9]))
    with pytest.raises(ValueError, match="not both"):
        model(x[:1], cu_seqlens=torch.tensor([0, 9]), attention_mask=torch.ones(1, 9))
    with pytest.raises(ValueError, match="attention_mask has shape"):
        model(x, attention_mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match="hides every token"):
        model(x, attention_mask=torch.zeros(2, 9))
    with pytest.raises(ValueError, match="sequence is empty"):
        model(x[:, :0])


NAMED = ("moneta", "yaad", "memora", "moneta_h", "yaad_h", "memora_h", "transformer", "linear_attention")
NAMED += ("deltanet", "gated_deltanet", "titans_lmm", "titans_mac", "titans_mag", "titans_mal")


@pytest.mark.parametrize("name", NAMED)
def test_named_models(name: str, build: Build) -> None:
    """Every parameter gets a gradient, a step along them lowers the loss, and text comes out."""
    model, x = build(getattr(models, name)(), hidden_size=64).train(), tokens(2, 20)
    loss = model(x, labels=x).loss
    loss.backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not bool((p.grad != 0).any())]
    assert not dead
    with torch.no_grad():
        for p in model.parameters():
            assert bool(p.grad.isfinite().all())
            p -= 1e-3 * p.grad / p.grad.norm()
    assert float(model(x, labels=x).loss.detach()) < float(loss.detach())
    assert model.eval().generate(x, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 23)


def test_reentrant_checkpointing_is_refused_where_layers_share(build: Build) -> None:
    """It would lose the gradients of the first layer's values, which RWKV-7's later layers mix in."""
    with pytest.raises(ValueError, match=r"use_reentrant=True would lose gradients"):
        build(models.rwkv7()).activation_checkpointing_enable({"use_reentrant": True})
    for design, reentrant in ((models.rwkv7(), False), (models.gla(), True)):
        model = build(design)
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        assert model.model.gradient_checkpointing
