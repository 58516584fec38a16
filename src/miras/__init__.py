"""Miras: sequence models as associative memories that learn at test time.

A model is four choices (Miras, arXiv 2504.13173, Table 1):

    memory      what maps keys to values        Vector, Matrix, MLP, GatedMLP
    bias        the inner loss                  Dot, L2, RidgeDot, Lp, Huber, Robust, Envelope
    retention   how it forgets                  L2, Lq, LqRms, LqMirror, KL, SignedKL, ElasticNet, ...
    learning    the online optimiser            GradientDescent, Momentum, MultiStep, Omega, Muon, OmegaMuon, Averaged,
                                                NonParametric

`Design` puts them together, `memorize` runs one, `MemoryLayer` is a layer of one, `MirasForCausalLM` a language model, and
`models` holds the named ones. `MemoryAsGate` and `MemoryAsContext` put a memory and attention into one layer (Titans).
"""

from miras import bias, features, inputs, learning, memory, models, retention
from miras.arrangement import make_mixer
from miras.design import Design, MemoryAsContext, MemoryAsGate, Pattern
from miras.engine import PATHS, AttentionState, MemoryState, explain, memorize
from miras.layer import MemoryLayer
from miras.lm import MirasCache, MirasConfig, MirasForCausalLM, MirasModel, compile_decoding
from miras.stream import stream

__version__ = "0.1.0"

__all__ = [
    "PATHS",
    "AttentionState",
    "Design",
    "MemoryAsContext",
    "MemoryAsGate",
    "MemoryLayer",
    "MemoryState",
    "MirasCache",
    "MirasConfig",
    "MirasForCausalLM",
    "MirasModel",
    "Pattern",
    "bias",
    "compile_decoding",
    "explain",
    "features",
    "inputs",
    "learning",
    "make_mixer",
    "memorize",
    "memory",
    "models",
    "retention",
    "stream",
]
