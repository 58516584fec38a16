"""Weights of flash-linear-attention checkpoints as Miras models: GLA, RetNet, DeltaNet, Gated DeltaNet, RWKV-7 and Mamba2.

A layout says which design a checkpoint's configuration means and which of our parameters each of its tensors is; every
tensor must find its place. Only the layout is read: the package itself is not needed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miras import models
from miras.choice import require
from miras.design import Design
from miras.inputs import Constant, Inputs, LogDecay, MambaDecay, Normalized, Output, Sigmoid
from miras.lm.config import MirasConfig
from miras.lm.hf import MirasForCausalLM

State = Mapping[str, Tensor]
Config = Mapping[str, Any]


@dataclass(frozen=True)
class Layout:
    """One family of checkpoints.

    design, sizes  what the configuration means: a design, and arguments of MirasConfig
    names          {its name of a layer's tensor: ours}, layers of the state dict being `prefix`.layers.i
    split          cuts tensors that hold several of ours, by the tensor's own name in a layer
    whole          the same as `names` outside the layers
    """

    design: Design
    sizes: dict[str, Any]
    names: dict[str, str]
    split: Mapping[str, Callable[[Tensor], dict[str, Tensor]]] = field(default_factory=dict[str, Any])
    prefix: str = "model"
    whole: Mapping[str, str] = field(default_factory=dict[str, str])


def from_fla(config: Config, state: State) -> MirasForCausalLM:
    """A Miras model with the weights of an fla checkpoint: its config.json as a dictionary, and its state dict.

    The model is in float32 (float64 if the checkpoint is). Memories start from zero, as those models do. It computes what
    fla does but for rounding and, with RWKV-7's `fuse_norm: false`, an epsilon: keys are x / sqrt(x^2 + 1e-6).

    Raises:
        ValueError: a model type without a converter, an option that changes the maths and has none, tensors that are
            missing, unknown, or of another size.
    """
    require(isinstance(config, Mapping), f"the configuration is a {type(config).__name__}; it must be a mapping")
    kind = str(config.get("model_type"))
    require(kind in LAYOUTS, f"model_type={kind!r} has no converter; there is one for: {', '.join(sorted(LAYOUTS))}")
    try:
        layout = LAYOUTS[kind](config, state)
    except KeyError as error:
        raise ValueError(f"the {kind} checkpoint lacks {error}, a tensor or an entry of its configuration") from error
    wide = any(x.dtype == torch.float64 for x in state.values())
    model = MirasForCausalLM(MirasConfig(design=layout.design, **layout.sizes))
    model = model.double() if wide else model
    _fill(model, _renamed(layout, state))
    return model.eval()


def load_fla(folder: str | Path) -> MirasForCausalLM:
    """The same from a checkpoint's folder: config.json, and *.safetensors or pytorch_model*.bin.

    Raises:
        FileNotFoundError: no configuration or no weights in the folder.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no config.json in {folder}; give the folder of a downloaded checkpoint")
    config = json.loads((folder / "config.json").read_text())
    state: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        from safetensors.torch import load_file

        state |= load_file(path)
    for path in [] if state else sorted(folder.glob("pytorch_model*.bin")):
        state |= torch.load(path, map_location="cpu", weights_only=True)
    if not state:
        raise FileNotFoundError(f"no weights in {folder}: neither *.safetensors nor pytorch_model*.bin")
    return from_fla(config, state)


TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt")


def convert_folder(folder: str | Path, out: str | Path) -> MirasForCausalLM:
    """Write the Miras model of a checkpoint's folder, and the tokenizer that lies in it, to `out`; returns the model.

    Raises:
        FileExistsError: `out` holds something already, or is a file.
        FileNotFoundError, ValueError: as `load_fla`.
    """
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out} is not an empty folder; give a new one")
    model = load_fla(folder)
    model.save_pretrained(out)
    for path in (path for pattern in TOKENIZER_FILES for path in sorted(Path(folder).glob(pattern))):
        shutil.copy(path, out)
    return model


def _renamed(layout: Layout, state: State) -> dict[str, Tensor]:
    """The tensors by our names."""
    found: dict[str, Tensor] = {}
    head = f"{layout.prefix}.layers."
    whole = {
        f"{layout.prefix}.embeddings.weight": "model.embeddings.weight",
        f"{layout.prefix}.norm.weight": "model.norm.weight",
    }
    whole |= {"lm_head.weight": "lm_head.weight", **layout.whole}
    for name, x in state.items():
        if name in whole:
            found[whole[name]] = x
            continue
        index, _, inner = name.removeprefix(head).partition(".")
        parts = layout.split[inner](x) if name.startswith(head) and inner in layout.split else {inner: x}
        for part, y in parts.items():
            require(name.startswith(head) and part in layout.names, f"the checkpoint's tensor {name!r} has no place here")
            found[f"model.layers.{index}.{layout.names[part]}"] = y
    return found


@torch.no_grad()
def _fill(model: MirasForCausalLM, tensors: State) -> None:
    """Copy tensors into a model; what the checkpoint cannot have becomes neutral, and nothing else may be missing."""
    targets = dict(model.named_parameters())
    if model.config.tie_word_embeddings:
        tensors = {name: x for name, x in tensors.items() if name != "lm_head.weight"}
    for name, target in targets.items():
        if name.endswith((".memory.W", ".b_proj.bias")) or (name.endswith("norm.bias") and name not in tensors):
            target.zero_()
        elif name.endswith("o_norm.weight"):
            target.fill_(1.0)
        else:
            require(name in tensors, f"the checkpoint has nothing for {name!r} {tuple(target.shape)}")
    for name, x in tensors.items():
        require(name in targets, f"the checkpoint has {name!r} {tuple(x.shape)}, which its configuration leaves out")
        target = targets[name]
        require(
            x.numel() == target.numel(),
            f"{name!r} has shape {tuple(x.shape)} in the checkpoint; its configuration asks for {tuple(target.shape)}",
        )
        target.copy_(x.reshape(target.shape))


def _refuse(config: Config, **allowed: Any) -> None:
    """Options that change the maths must have the one value that is converted; a tuple allows several."""
    for name, values in allowed.items():
        options = values if isinstance(values, tuple) else (values,)
        value = config.get(name, options[0])
        value = tuple(value) if isinstance(value, list) else value
        require(value in options, f"{name}={value!r} is not converted; allowed: {', '.join(map(repr, options))}")


def _sizes(config: Config, state: State, num_heads: int, head_dim: int, **more: Any) -> dict[str, Any]:
    """What every configuration has; the MLP's width is read off its weights."""
    gate = state.get("model.layers.0.mlp.gate_proj.weight")
    width = {} if gate is None else {"intermediate_size": gate.shape[0]}
    copied = ("vocab_size", "hidden_size", "num_hidden_layers", "norm_eps", "bos_token_id", "eos_token_id", "pad_token_id")
    found = {name: config[name] for name in copied if name in config}
    tied = {"tie_word_embeddings": config.get("tie_word_embeddings", False)}
    return {**found, **tied, **width, "num_heads": num_heads, "head_dim": head_dim, **more}


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_BLOCK = {
    "attn.b_proj.weight": "attn.b_proj.proj.weight",
    **dict.fromkeys(("attn.g_norm_swish_gate.weight", "attn.g_norm.weight"), "attn.o_norm.weight"),
    **_same(
        "attn_norm.weight",
        "mlp_norm.weight",
        *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
        *(f"attn.{name}_proj.weight" for name in "qkvgo"),
        *(f"attn.{name}_conv1d.{part}" for name in "qkv" for part in ("weight", "bias")),
        "attn.o_norm.weight",
    ),
}


def _ratio(width: float, heads: int, head_dim: int) -> float:
    return width / (heads * head_dim)


def _expanded(config: Config, design: Design, expand_k: float, expand_v: float, **changes: Any) -> tuple[Design, int, int]:
    """A design whose heads share hidden_size * expand_k (expand_v) channels of keys (values); heads, their key width."""
    hidden, heads = config["hidden_size"], config["num_heads"]
    head_dim = round(hidden * config.get("expand_k", expand_k)) // heads
    values = _ratio(round(hidden * config.get("expand_v", expand_v)), heads, head_dim)
    short = config.get("use_short_conv", False)
    conv = {"conv_size": config.get("conv_size", 4), "activation": "silu"} if short else {}
    inputs = replace(design.inputs, key_ratio=1.0, value_ratio=values, **{**conv, **changes})
    return replace(design, inputs=inputs), heads, head_dim


def _repeated(config: Config) -> dict[str, Callable[[Tensor], dict[str, Tensor]]]:
    """Keys, values and decays that several heads share, once for each of these."""
    heads, shared = config["num_heads"], config.get("num_kv_heads") or config["num_heads"]
    if heads == shared:
        return {}
    names = [f"attn.{name}_{part}" for name in "kv" for part in ("proj.weight", "conv1d.weight")]
    names += [f"attn.gk_proj.1.{part}" for part in ("weight", "bias")]

    def repeat(name: str, x: Tensor) -> dict[str, Tensor]:
        return {name: x.unflatten(0, (shared, -1)).repeat_interleave(heads // shared, 0).flatten(0, 1)}

    return {name: partial(repeat, name) for name in names}


def _gla(config: Config, state: State) -> Layout:
    _refuse(config, attn=None, feature_map=None, clamp_min=None)
    _refuse(config, hidden_act="swish", attnres_block_size=None)
    # fla reads neither the normalizer of the gates nor their rank from the configuration: 16 whatever it says.
    rank = state["model.layers.0.attn.gk_proj.0.weight"].shape[0]
    decay = LogDecay(23.0, temperature=16.0, per_channel=True, rank=rank)
    output = Output(gate="silu" if config.get("use_output_gate", True) else None)
    design, heads, head_dim = _expanded(config, models.gla(), 0.5, 1.0, decay=decay, output=output)
    names = {f"attn.gk_proj.{i}.weight": f"attn.a_proj.proj.{i}.weight" for i in range(2)}
    names |= _BLOCK | {"attn.gk_proj.1.bias": "attn.a_proj.bias"}
    return Layout(design, _sizes(config, state, heads, head_dim), names, _repeated(config))


def _retnet(config: Config, state: State) -> Layout:
    _refuse(config, attn=None, feature_map=None, hidden_act="swish", attnres_block_size=None)
    output = Output(gate="silu" if config.get("use_output_gate", True) else None)
    # fla's RetNet has no convolution, whatever the configuration says.
    design, heads, head_dim = _expanded({**config, "use_short_conv": False}, models.retnet(), 1.0, 2.0, output=output)
    return Layout(design, _sizes(config, state, heads, head_dim), _BLOCK, _repeated(config))


def _delta_net(config: Config, state: State) -> Layout:
    _refuse(config, attn=None, qk_norm="l2", qk_activation="silu", hidden_act="swish", attnres_block_size=None)
    negative = config.get("allow_neg_eigval", False)
    changes: dict[str, Any] = {"features": Normalized(scaled=True), "activation": "silu"}
    if not config.get("use_beta", True):
        changes["rate"] = Constant(2.0 if negative else 1.0)
    changes["conv_size"] = config.get("conv_size", 4) if config.get("use_short_conv", True) else 0
    changes["output"] = Output(gate="silu" if config.get("use_gate", False) else None)
    design, heads, head_dim = _expanded(config, models.deltanet(negative), 1.0, 1.0, **changes)
    return Layout(design, _sizes(config, state, heads, head_dim), _BLOCK)


def _gated_deltanet(config: Config, state: State) -> Layout:
    _refuse(config, attn=None, hidden_act="swish", attnres_block_size=None)
    heads = config.get("num_v_heads") or config["num_heads"]
    head_dim = config.get("head_dim", 256)
    negative = config.get("allow_neg_eigval", False)
    activation = {"swish": "silu"}.get(config.get("output_gate_activation", "swish"), "sigmoid")
    inputs = Inputs(
        Normalized(scaled=True),
        rate=Sigmoid(1.0, 2.0) if negative else Sigmoid(),
        decay=MambaDecay(),
        conv_size=config.get("conv_size", 4) if config.get("use_short_conv", True) else 0,
        value_ratio=config.get("expand_v", 2.0),
        key_heads=config["num_heads"],
        weight_std=0.0,
        output=Output(gate=activation if config.get("use_gate", True) else None),
    )
    names = {"attn.a_proj.weight": "attn.a_proj.proj.weight"}
    names |= {f"attn.{name}": f"attn.a_proj.{name}" for name in ("A_log", "dt_bias")}
    return Layout(models.gated_deltanet(inputs=inputs), _sizes(config, state, heads, head_dim), _BLOCK | names)


def _low_rank(theirs: str, ours: str, bias: str | None) -> dict[str, str]:
    """RWKV's low-rank projections: a sequence of two linear maps with an activation (or none) in the middle."""
    names = {
        f"attn.{theirs}.lora.0.weight": f"attn.{ours}.0.weight",
        f"attn.{theirs}.lora.2.weight": f"attn.{ours}.1.weight",
    }
    return names if bias is None else {**names, f"attn.{theirs}.lora.2.bias": f"attn.{bias}"}


def _rwkv7(config: Config, state: State) -> Layout:
    hidden = config["hidden_size"]
    head_dim = config.get("head_dim") or hidden // config["num_heads"]
    layers = config["num_hidden_layers"]
    _refuse(config, attn=None, hidden_act="sqrelu", value_dim=(None, hidden, (hidden,) * layers))
    last = f"model.layers.{layers - 1}.attn."
    eps = config.get("norm_eps", 1e-5)

    def rank(name: str) -> int | None:
        down = state.get(f"{last}{name}.lora.0.weight")
        return None if down is None else down.shape[0]

    base = models.rwkv7().inputs
    inputs = replace(
        base,
        rate=replace(base.rate, rank=rank("a_lora")),
        decay=replace(models.rwkv7().inputs.decay or base.rate, rank=rank("w_lora")),
        gates={name: replace(gate, rank=rank("v_lora")) for name, gate in base.gates.items()},
        output=replace(base.output, rank=rank("g_lora"), eps=head_dim * eps),
    )
    names = _same("attn.k_proj.weight", "attn.v_proj.weight", "attn.o_proj.weight", "attn_norm.weight", "attn_norm.bias")
    shifts = {"x_r": "q", "x_w": "decay", "x_k": "k", "x_v": "v", "x_a": "rate", "x_g": "gate"}
    names |= {f"attn.{theirs}": f"attn.token_shift.{ours}" for theirs, ours in shifts.items()}
    names |= {f"attn.{name}": f"attn.features.{name}" for name in ("k_k", "k_a", "r_k")}
    names |= {"attn.r_proj.weight": "attn.q_proj.weight"}
    names |= {f"attn.g_norm.{part}": f"attn.o_norm.{part}" for part in ("weight", "bias")}
    names |= _low_rank("w_lora", "a_proj.proj", "a_proj.bias") | _low_rank("a_lora", "b_proj.proj", "b_proj.bias")
    names |= _low_rank("v_lora", "gate_projs.residual.proj", "gate_projs.residual.bias") | _low_rank(
        "g_lora", "g_proj", None
    )
    names |= {f"ffn_norm.{part}": f"mlp_norm.{part}" for part in ("weight", "bias")}
    names |= {"ffn.x_k": "mlp.token_shift.key", "ffn.key.weight": "mlp.key.weight", "ffn.value.weight": "mlp.value.weight"}
    whole = {"model.norm.bias": "model.norm.bias"}
    whole |= {f"model.layers.0.pre_norm.{part}": f"model.embedding_norm.{part}" for part in ("weight", "bias")}
    first = config.get("norm_first", True)
    block = {"norm": "layer", "mlp": "channel_mix", "embedding_norm": first}
    width = {"intermediate_size": state["model.layers.0.ffn.key.weight"].shape[0]}
    sizes = _sizes(config, state, hidden // head_dim, head_dim, **block, **width)
    # Older files hold all shares of the token shift in one tensor.
    split = {"attn.x_x": lambda x: dict(zip((f"attn.{name}" for name in shifts), x, strict=True))}
    return Layout(models.rwkv7(inputs=inputs), sizes, names, split, whole=whole)


def _mamba2(config: Config, state: State) -> Layout:
    _refuse(config, use_bias=False, D_has_hdim=False, hidden_act=("silu", "swish"))
    limit = tuple(float(x["__float__"]) if isinstance(x, Mapping) else float(x) for x in config.get("dt_limit", (0, "inf")))
    require(limit == (0.0, float("inf")), f"dt_limit={limit} is not converted; allowed: (0.0, inf)")
    head_dim, size, groups = config.get("head_dim", 64), config.get("state_size", 128), config.get("n_groups", 1)
    inner = round(config.get("expand", 2) * config["hidden_size"])
    inputs = replace(
        models.mamba2().inputs,
        conv_size=config.get("conv_kernel", 4),
        conv_bias=config.get("use_conv_bias", True),
        key_ratio=size / head_dim,
        value_ratio=1.0,
        key_heads=groups,
        output=Output(
            "rms" if config.get("rmsnorm", True) else None,
            groups=groups,
            gate_first=not config.get("norm_before_gate", False),
        ),
    )
    keys = groups * size

    def convolved(x: Tensor, part: str) -> dict[str, Tensor]:
        return dict(zip((f"v_{part}", f"k_{part}", f"q_{part}"), x.split((inner, keys, keys)), strict=True))

    def projected(x: Tensor) -> dict[str, Tensor]:
        width = 2 * inner + 2 * keys + inner // head_dim
        require(len(x) == width, f"in_proj has {len(x)} rows; its configuration asks for {width}")
        gate, conv, dt = x.split((inner, inner + 2 * keys, inner // head_dim))
        return {"gate": gate, "dt": dt, **convolved(conv, "proj")}

    split = {"mixer.in_proj.weight": projected}
    split["mixer.conv1d.weight"] = lambda x: convolved(x, "weight")
    split["mixer.conv1d.bias"] = lambda x: convolved(x, "bias")
    names = {"gate": "attn.g_proj.weight", "dt": "attn.b_proj.proj.weight", "norm.weight": "attn_norm.weight"}
    for name in "qkv":
        names[f"{name}_proj"] = f"attn.{name}_proj.weight"
        names |= {f"{name}_{part}": f"attn.{name}_conv1d.{part}" for part in ("weight", "bias")}
    names |= {"mixer.dt_bias": "attn.b_proj.dt_bias", "mixer.norm.weight": "attn.o_norm.weight"}
    names |= {f"mixer.{name}": f"attn.features.{name}" for name in ("A_log", "D")}
    names |= {"mixer.out_proj.weight": "attn.o_proj.weight"}
    sizes = _sizes(config, state, inner // head_dim, head_dim, mlp=None)
    whole = {"backbone.norm_f.weight": "model.norm.weight", "backbone.embedding.weight": "model.embeddings.weight"}
    return Layout(models.mamba2(inputs=inputs), sizes, names, split, "backbone", whole)


LAYOUTS: dict[str, Callable[[Config, State], Layout]] = {
    "gla": _gla,
    "retnet": _retnet,
    "delta_net": _delta_net,
    "gated_deltanet": _gated_deltanet,
    "rwkv7": _rwkv7,
    "mamba2": _mamba2,
}
"""The layout of each model type."""
