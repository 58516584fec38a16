"""Checkpoints in fla's layout, randomly initialised, against their models' formulas (tests/lm/fla_formulas.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fla_formulas import logits
from fla_states import CONFIGS, random_state
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from miras.cli import main
from miras.lm.fla import LAYOUTS, from_fla, load_fla

REFUSED = {
    "gla_conv": "clamp_min=-0.05 is not converted; allowed: None",
    "delta_net_sum": "qk_norm='sum' is not converted; allowed: 'l2'",
    "delta_net_relu": "qk_activation='relu' is not converted; allowed: 'silu'",
    "delta_net_identity": "qk_activation='identity' is not converted",
    "rwkv7_plain": "hidden_act='relu' is not converted; allowed: 'sqrelu'",
    "mamba2_groups": r"dt_limit=\(0.3, 2.0\) is not converted",
    "mamba2_before": "D_has_hdim=True is not converted",
    "mamba2_bias": "use_bias=True is not converted",
}
"""Configurations with an option that has no counterpart, and what is said of it."""


def without(name: str, **changes: Any) -> dict[str, Any]:
    """A refused configuration with the option that it is refused for changed."""
    return CONFIGS[name] | changes


CONVERTED = {name: config for name, config in CONFIGS.items() if name not in REFUSED} | {
    "gla_conv": without("gla_conv", clamp_min=None),
    "gla_shared_conv": CONFIGS["gla_shared"] | {"use_short_conv": True},
    "rwkv7_plain": without("rwkv7_plain", hidden_act="sqrelu"),
    "mamba2_groups": without("mamba2_groups", dt_limit=[0.0, {"__float__": "Infinity"}]),
    "mamba2_before": without("mamba2_before", D_has_hdim=False),
    "mamba2_unnormed": without("mamba2_bias", use_bias=False),
}

TOLERANCES = {"rwkv7_unfused": 1e-4}
"""Where an epsilon differs (see `from_fla`)."""


def checkpoint(config: dict[str, Any]) -> dict[str, Tensor]:
    return random_state(config, torch.Generator().manual_seed(0))


def tokens(config: dict[str, Any]) -> Tensor:
    return torch.randint(0, config["vocab_size"], (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CONVERTED)
def test_logits_and_gradients(name: str) -> None:
    """Logits, and their gradients in what every token goes through: the embeddings and the last norm."""
    config = CONVERTED[name]
    state, ids = checkpoint(config), tokens(config)
    model = from_fla(config, state)
    tracked = {key: x.clone().requires_grad_() for key, x in state.items()}
    expected, found = logits(config, tracked, ids), model(ids).logits
    tolerance = TOLERANCES.get(name, 1e-9)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    weight = torch.sin(torch.arange(found.numel(), dtype=torch.float64)).view_as(found)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    body = "backbone" if config["model_type"] == "mamba2" else "model"
    norm = "norm_f" if body == "backbone" else "norm"
    for ours, theirs in (("embeddings.weight", "embeddings.weight"), ("norm.weight", f"{norm}.weight")):
        gradient = model.model.get_parameter(ours).grad
        torch.testing.assert_close(gradient, tracked[f"{body}.{theirs}"].grad, rtol=10 * tolerance, atol=10 * tolerance)


def test_every_family_is_converted() -> None:
    assert {config["model_type"] for config in CONVERTED.values()} == set(LAYOUTS)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_options(name: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[name]):
        from_fla(CONFIGS[name], checkpoint(CONFIGS[name]))


def test_refused_checkpoints() -> None:
    config = CONFIGS["gated_deltanet"]
    state = checkpoint(config)
    with pytest.raises(ValueError, match=r"model_type='comba' has no converter; there is one for: delta_net, gated"):
        from_fla({**config, "model_type": "comba"}, state)
    with pytest.raises(ValueError, match=r"tensor 'model.layers.1.attn.extra' has no place here"):
        from_fla(config, {**state, "model.layers.1.attn.extra": torch.zeros(1)})
    fewer = {name: x for name, x in state.items() if name != "model.layers.0.attn.A_log"}
    with pytest.raises(ValueError, match=r"nothing for 'model.layers.0.attn.a_proj.A_log' \(2,\)"):
        from_fla(config, fewer)
    with pytest.raises(ValueError, match=r"'model.layers.0.attn.o_norm.weight' has shape \(5,\) in the checkpoint"):
        from_fla(config, {**state, "model.layers.0.attn.o_norm.weight": torch.ones(5)})
    with pytest.raises(ValueError, match=r"has 'model.layers.0.attn.g_proj.weight' .* which its configuration leaves out"):
        from_fla({**config, "use_gate": False}, state)


@pytest.mark.parametrize("kind", sorted(LAYOUTS))
def test_what_is_lacking_is_named(kind: str) -> None:
    with pytest.raises(ValueError, match=f"the {kind} checkpoint lacks '"):
        from_fla({"model_type": kind}, {})


def test_configurations_that_do_not_fit() -> None:
    config = CONFIGS["mamba2"]
    state = checkpoint(config)
    with pytest.raises(ValueError, match="the configuration is a list; it must be a mapping"):
        from_fla([config], state)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"in_proj has \d+ rows; its configuration asks for \d+"):
        from_fla({**config, "state_size": 2 * config.get("state_size", 128)}, state)


def test_older_rwkv7_files_hold_the_shares_in_one_tensor() -> None:
    config = CONFIGS["rwkv7"]
    state = checkpoint(config)
    older = {name: x for name, x in state.items() if ".attn.x_" not in name}
    for layer in range(config["num_hidden_layers"]):
        shares = [state[f"model.layers.{layer}.attn.x_{part}"].flatten() for part in "rwkvag"]
        older[f"model.layers.{layer}.attn.x_x"] = torch.stack(shares)
    ids = tokens(config)
    assert torch.equal(from_fla(config, older)(ids).logits, from_fla(config, state)(ids).logits)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_folders(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a downloaded folder to a Miras model that loads by itself, by the command."""
    config = CONFIGS["mamba2"]
    state = {name: x.float() for name, x in checkpoint(config).items()}
    source, out = tmp_path / "theirs", tmp_path / "ours"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    (source / "tokenizer_config.json").write_text("{}")
    halves = (dict(list(state.items())[:5]), dict(list(state.items())[5:]))
    for index, half in enumerate(halves):
        if form == "bin":
            torch.save(half, source / f"pytorch_model-{index}.bin")
        else:
            save_file(half, source / f"model-{index}.safetensors")
    with pytest.raises(SystemExit, match="0"):
        main(["convert", str(source), str(out)])
    assert "2 layers" in capsys.readouterr().out
    assert (out / "tokenizer_config.json").exists()
    model, ids = AutoModelForCausalLM.from_pretrained(out), tokens(config)
    torch.testing.assert_close(model(ids).logits, load_fla(source)(ids).logits)
    expected = logits(config, {name: x.double() for name, x in state.items()}, ids)
    torch.testing.assert_close(model(ids).logits.double(), expected, rtol=1e-4, atol=1e-4)
    generated = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert generated.shape == (2, 12)
    with pytest.raises(SystemExit, match="1"):
        main(["convert", str(source), str(out)])
    assert "is not an empty folder" in capsys.readouterr().err


def test_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config.json in .*; give the folder of a downloaded checkpoint"):
        load_fla(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="no weights in"):
        load_fla(tmp_path)
