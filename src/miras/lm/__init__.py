"""The language model: one configuration, one backbone and one cache for every design, as Hugging Face classes."""

from miras.lm.cache import MirasCache
from miras.lm.config import MirasConfig
from miras.lm.decoding import compile_decoding
from miras.lm.fla import from_fla, load_fla
from miras.lm.hf import MirasForCausalLM, MirasModel, MirasPreTrainedModel

__all__ = [
    "MirasCache",
    "MirasConfig",
    "MirasForCausalLM",
    "MirasModel",
    "MirasPreTrainedModel",
    "compile_decoding",
    "from_fla",
    "load_fla",
]
