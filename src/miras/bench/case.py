"""What is measured: a design at sizes, and the tensors that a layer of it would give its memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from miras.choice import require, require_one_of
from miras.design import Design
from miras.layer import MemoryLayer
from miras.models import named

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}

MODES = ("forward", "forward+backward", "decode")
"""decode: one token at a time, after a context of `tokens` tokens."""

DECODED = 64
"""Tokens a row that one repeat of decoding writes."""


@dataclass(frozen=True)
class Case:
    """A memory of `design` for q, k, v [batch, tokens, heads, head_dim], on a device; `model` is what it is called."""

    model: str
    design: Design
    batch: int = 2
    tokens: int = 2048
    heads: int = 4
    head_dim: int = 64
    dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("batch", "tokens", "heads", "head_dim"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}; must be at least 1")
        require_one_of("dtype", self.dtype, tuple(DTYPES))
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise ValueError(f"device={self.device!r}; allowed: cpu, cuda, cuda:0, ...") from error
        require(device.type != "cuda" or torch.cuda.is_available(), f"device={self.device!r}, but no CUDA device is usable")

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal numbers of the case's type, on its device, with a gradient."""
        return (scale * torch.randn(*shape)).to(self.device, self.torch_dtype).requires_grad_()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**vars(self), "design": self.design.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Case:
        """The case of a `to_dict`."""
        values: dict[str, Any] = {**data, "design": Design.from_dict(data["design"])}
        return cls(**values)


def named_design(name: str, overrides: Iterable[str] = ()) -> Design:
    """The design of a named model with `key=value` overrides, as under `model.design` in a recipe.

    Of an arrangement, or a pattern over layers, it is the first memory.

    Raises:
        ValueError: unknown names, keys or values.
    """
    from omegaconf import OmegaConf

    given = list(overrides)
    for item in given:
        require("=" in item.strip("="), f"override {item!r} is not of the form key=value, for example bias.kind=Huber")
    values: Any = OmegaConf.to_container(OmegaConf.from_dotlist(given))
    parts = named(name, **values).parts
    return next((part for part in parts if part.parametric), parts[0])


def memory_inputs(case: Case, context: int = 0) -> dict[str, Any]:
    """Keyword arguments of `miras.memorize` for context + tokens tokens: what a fresh layer makes of random hidden states.

    q, k and v are of the case's dtype, the rest in float32 at least; all floating tensors are leaves with a gradient.
    """
    torch.manual_seed(0)
    width, tokens = case.heads * case.head_dim, context + case.tokens
    layer = MemoryLayer(width, case.heads, case.design, case.head_dim)
    wide = torch.float64 if case.dtype == "float64" else torch.float32
    layer = layer.to(wide)

    def leaf(x: Tensor | None, dtype: torch.dtype = wide) -> Tensor | None:
        return None if x is None else x.detach().to(case.device, dtype).contiguous().requires_grad_()

    with torch.no_grad():
        hidden = torch.randn(case.batch, tokens, width, dtype=wide)
        uses, _ = layer._uses(hidden, None, None, keep=False)
        stream = layer._stream(uses, torch.arange(tokens).expand(case.batch, -1), None)
        weights = layer._weights()
    return {
        "design": case.design,
        **{name: leaf(getattr(stream, name), case.torch_dtype) for name in "qkv"},
        "weights": {name: leaf(x) for name, x in weights.items()},
        "lr": leaf(stream.lr),
        "log_decay": leaf(stream.log_decay),
        "gates": {name: leaf(stream.gates[name]) for name in (gate.name for gate in case.design.gates)},
    }


def leaves(inputs: Mapping[str, Any]) -> list[Tensor]:
    """Every tensor of `memory_inputs`."""
    groups = [inputs[name].values() if name in ("weights", "gates") else [inputs[name]] for name in inputs]
    return [x for group in groups for x in group if isinstance(x, Tensor)]


def cut(inputs: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """The inputs of tokens start to stop."""
    n = inputs["design"].learning.micro_steps

    def part(name: str, x: Tensor | None) -> Tensor | None:
        times = 1 if name in ("q", "log_decay") else n
        return None if x is None else x[:, start * times : stop * times]

    found = {name: part(name, inputs[name]) for name in ("q", "k", "v", "lr", "log_decay")}
    gates = {name: part(name, x) for name, x in inputs["gates"].items()}
    return {**inputs, **found, "gates": gates}


def with_refresh(case: Case, refresh: int) -> Case:
    """The case with another refresh window, token rates and rotations of TTT included."""
    changed: dict[str, Any] = {"refresh": refresh}
    features, gates = case.design.inputs.features, dict(case.design.inputs.gates)
    if hasattr(features, "length"):
        features = replace(features, length=refresh)  # type: ignore[call-arg]
    gates = {name: replace(g, length=refresh) if hasattr(g, "length") else g for name, g in gates.items()}  # type: ignore[call-arg]
    changed["inputs"] = replace(case.design.inputs, features=features, gates=gates)
    return replace(case, design=replace(case.design, **changed))
