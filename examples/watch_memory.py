"""What surprises a trained memory: python examples/watch_memory.py runs/quickstart "some text"."""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import miras  # noqa: F401  (registers the architecture with the Auto classes)
from miras.evals.sample import prompt_ids
from miras.report.inspection import inspect_memory

folder, text = sys.argv[1], sys.argv[2]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
ids = prompt_ids(tokenizer, text)[0].tolist()
found = inspect_memory(model, ids)

print(f"{'token':>16}  loss at (k, v) before -> after writing, per layer (mean of heads)")
for t, token in enumerate(ids):
    cells = (
        f"{layer.measures['loss_before'][t].mean():9.3f} -> {layer.measures['loss_after'][t].mean():7.3f}"
        for layer in found.layers
    )
    print(f"{tokenizer.decode([token])!r:>16}  {'  '.join(cells)}")
surprise = found.surprise()
if surprise is not None:
    top = torch.topk(surprise, min(5, len(ids))).indices.tolist()
    print("most surprising:", ", ".join(repr(tokenizer.decode([ids[t]])) for t in top))
