"""Configuration of a Miras language model: the design as JSON, and the backbone's sizes."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import PretrainedConfig

from miras.choice import require, require_one_of
from miras.design import LayerDesign, Pattern, design_from

MLP_MULTIPLE = 32
"""The default MLP width is rounded up to a multiple of this."""


SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_heads", "head_dim", "intermediate_size")

PLACED = ("design", *(name for name in SIZES if name != "head_dim"), "bos_token_id", "eos_token_id")
"""Arguments that recipes and studies set without `extra`."""


class MirasConfig(PretrainedConfig):
    """A language model: `num_hidden_layers` blocks of a memory layer and a SwiGLU MLP, each behind an RMSNorm.

    design                 a Design or an arrangement, a Pattern of them over the layers, or what their `to_dict` gives
                           (default: Yaad)
    num_heads, head_dim    heads of a layer, and their width (default hidden_size / num_heads)
    intermediate_size      width of the MLP (default 2/3 * hidden_ratio * hidden_size, rounded up to a multiple of 32)
    norm                   "rms" or "layer" (with bias): the norms before each layer and MLP, and the last one
    mlp                    "swiglu", "channel_mix" (RWKV's) or None: what follows each memory layer
    embedding_norm         whether the embeddings are normalised too (RWKV)
    initializer_range      spread of the initial projections and embeddings (default 1 / sqrt(hidden_size); 0.02 keeps small
                           models from learning recall, docs/results); memories and gates have their design's own
    max_position_embeddings  for information only: nothing in the model depends on it

    Layer i uses `config.layer_design(i)`; `config.arrangement` is the design or pattern as an object.

    >>> config = MirasConfig(design=miras.models.yaad(), hidden_size=256, num_hidden_layers=4, num_heads=4)

    Raises:
        TypeError: a design that is none, sizes that are no integers, a misspelt argument.
        ValueError: sizes that do not fit together, a design that is not legal.
    """

    model_type: ClassVar[str] = "miras"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {"num_attention_heads": "num_heads"}

    def __init__(
        self,
        design: LayerDesign | Pattern | Mapping[str, Any] | None = None,
        vocab_size: int = 32000,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_heads: int = 12,
        head_dim: int | None = None,
        hidden_ratio: float = 4,
        intermediate_size: int | None = None,
        norm_eps: float = 1e-5,
        norm: str = "rms",
        mlp: str | None = "swiglu",
        embedding_norm: bool = False,
        initializer_range: float | None = None,
        tie_word_embeddings: bool = True,
        max_position_embeddings: int = 4096,
        use_cache: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        _refuse_misspelt(kwargs)
        if design is None:
            from miras.models import yaad

            design = yaad()
        self.design: dict[str, Any] = design_from(design).to_dict()
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_heads, self.head_dim = num_heads, head_dim
        self.hidden_ratio, self.intermediate_size = hidden_ratio, intermediate_size
        self.norm, self.mlp, self.embedding_norm = norm, mlp, embedding_norm
        require_one_of("norm", norm, ("rms", "layer"))
        require_one_of("mlp", mlp, ("swiglu", "channel_mix", None))
        self._check_sizes()
        if head_dim is None:
            self.head_dim = hidden_size // num_heads
        if intermediate_size is None:
            width = int(2 * hidden_ratio * hidden_size / 3)
            self.intermediate_size = MLP_MULTIPLE * -(-width // MLP_MULTIPLE)
        self.norm_eps = norm_eps
        self.initializer_range = hidden_size**-0.5 if initializer_range is None else initializer_range
        self.max_position_embeddings, self.use_cache = max_position_embeddings, use_cache
        shared: dict[str, Any] = {
            "bos_token_id": bos_token_id,
            "eos_token_id": eos_token_id,
            "pad_token_id": pad_token_id,
            "tie_word_embeddings": tie_word_embeddings,
        }
        super().__init__(**{**shared, **kwargs})

    @property
    def arrangement(self) -> LayerDesign | Pattern:
        """The design, arrangement or pattern of them."""
        return design_from(self.design)

    def layer_design(self, layer_idx: int) -> LayerDesign:
        """The design of a layer: designs[layer_idx % number of designs]."""
        designs = self.arrangement.designs
        return designs[layer_idx % len(designs)]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        return {**super().to_dict(), "design": self.arrangement.to_dict()}

    def _check_sizes(self) -> None:
        for name in SIZES:
            value = getattr(self, name)
            if value is None and name in ("head_dim", "intermediate_size"):
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}={value!r}; must be a positive integer")
            require(value >= 1, f"{name}={value}; must be a positive integer")
        require(
            self.head_dim is not None or self.hidden_size % self.num_heads == 0,
            f"hidden_size={self.hidden_size} is not divisible by num_heads={self.num_heads}; choose another number of "
            "heads, or give head_dim",
        )
        require(self.hidden_ratio > 0, f"hidden_ratio={self.hidden_ratio}; must be positive")


def _refuse_misspelt(given: Mapping[str, Any]) -> None:
    # PretrainedConfig keeps any keyword as an attribute, so a slip such as num_layers would pass in silence.
    for name in given:
        near = difflib.get_close_matches(name, SIZES, n=1, cutoff=0.7)
        if near and name not in MirasConfig.attribute_map:
            raise TypeError(f"MirasConfig has no argument {name!r}; did you mean {near[0]!r}?")


def further_arguments(extra: Mapping[str, Any]) -> dict[str, Any]:
    """The `extra` of a recipe or study. Raises ValueError for what is no argument of MirasConfig or has its place elsewhere.

    What PretrainedConfig takes beside these would be stored, and nothing in the model would depend on it.
    """
    known = [name for name in inspect.signature(MirasConfig.__init__).parameters if name not in ("self", "kwargs", *PLACED)]
    for name in extra:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            hint = "; the file, its task or its tokenizer says that elsewhere" if name in PLACED else hint
            raise ValueError(f"extra has the key {name!r}; allowed: {', '.join(known)}{hint}")
    return dict(extra)
