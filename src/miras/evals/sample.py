"""Text written by a trained model."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, set_seed

from miras.train.data import separator_id


def write_text(
    model: Any,  # a PreTrainedModel with `generate`
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_p: float = 0.95,
    greedy: bool = False,
    seed: int | None = None,
    streamer: Any = None,
) -> str:
    """The prompt and its continuation; `streamer` (a transformers TextStreamer) sees the tokens as they come.

    The separator goes before the prompt, since every document in training began with it.
    Raises ValueError for a temperature that is not positive or a top_p outside (0, 1].
    """
    if not greedy and temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be positive (for the likeliest text use greedy)")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1")
    if seed is not None:
        set_seed(seed)
    was_training = model.training
    model.eval()
    choose: dict[str, Any] = {"do_sample": False, "pad_token_id": separator_id(tokenizer)}
    if not greedy:
        choose |= {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    with torch.no_grad():
        ids = prompt_ids(tokenizer, prompt).to(model.device)
        mask = torch.ones_like(ids)
        written = model.generate(ids, attention_mask=mask, max_new_tokens=max_new_tokens, streamer=streamer, **choose)
    model.train(was_training)
    return str(tokenizer.decode(written[0], skip_special_tokens=True))


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> torch.Tensor:
    """The prompt's ids [1, T], the separator first."""
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([[separator_id(tokenizer), *ids]])
