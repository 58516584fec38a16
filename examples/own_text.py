"""Train a small Yaad on your own text from Python, then let it write: python examples/own_text.py PATH [PROMPT]."""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import miras  # noqa: F401  (registers the architecture with the Auto classes)
from miras.evals.sample import write_text
from miras.train import recipe_from
from miras.train.run import train

recipe = recipe_from(
    {
        "out": f"runs/{Path(sys.argv[1]).stem}",
        "model": {"name": "yaad", "design": {"refresh": 16}, "hidden_size": 128, "num_hidden_layers": 3, "num_heads": 4},
        "data": {"corpus": sys.argv[1], "vocab_size": 2048, "block_size": 256},
        "train": {"tokens": 500_000, "batch_size": 8, "lr": 3e-3, "eval_every": 50},
        "sample": {"prompt": " ".join(sys.argv[2:]) or "The"},
    }
)
result = train(recipe)
print(f"{result.parameters:,} parameters, {result.bits_per_byte:.3f} bits per byte of held-out text")

model = AutoModelForCausalLM.from_pretrained(result.folder)
tokenizer = AutoTokenizer.from_pretrained(result.folder)
print(write_text(model, tokenizer, recipe.sample.prompt, max_new_tokens=100, temperature=0.7))
