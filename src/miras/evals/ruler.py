"""Whether a sample of RULER fits the lengths that were asked for, before the harness makes any.

Its generators try a sample that does not fit again, some for ever. Here is the shortest sample that each can make; the
tasks whose text comes from the hub (niah_single_2 and others, the ruler_qa) are not among them.

Source: RULER (arXiv 2404.06654), as lm-evaluation-harness generates it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial

from lm_eval.tasks.ruler import cwe_utils, fwe_utils, niah_utils, prepare_niah, vt_utils
from transformers import PreTrainedTokenizerBase

GROUP = "ruler"
EXAMPLE = 500
"""Tokens that ruler_vt leaves for the example in its prompt, whatever a sample's length."""


def check(tasks: Sequence[str], tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int]) -> None:
    """Raise ValueError if a task's shortest sample, with room for the answer, takes more tokens than one of `lengths`."""
    random.seed(0)
    for task, shortest in SHORTEST.items():
        if task not in tasks and GROUP not in tasks:
            continue
        for length in lengths:
            need = shortest(length, tokenizer)
            if need > length:
                raise ValueError(
                    f"{task}: its shortest samples take about {need} tokens with this tokenizer, room for the answer with "
                    f"them, which do not fit {length}; give a longer --ruler-length"
                )


def _count(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text)["input_ids"])


def _needle(haystack: str, needle: str, _: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """A single sentence beside the needle."""
    text, *_rest = prepare_niah.generate_input_output(
        1,
        prepare_niah.get_haystack(haystack),
        template=niah_utils.TEMPLATE,
        num_needle_k=1,
        num_needle_v=1,
        type_haystack=haystack,
        type_needle_k="uuids" if needle == "uuids" else "words",
        type_needle_v=needle,
    )
    return _count(tokenizer, text) + 128


def _variables(_: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Ten sentences of noise, and before them an example that fills `EXAMPLE` as far as it can."""
    text, variables = vt_utils.generate_input_output(5, 1, 4, is_icl=True)
    need = _count(tokenizer, f"{text} {variables}") + 30
    if need > EXAMPLE:
        raise ValueError(
            f"ruler_vt: the example in its prompts takes about {need} tokens with this tokenizer, and the harness leaves "
            f"{EXAMPLE} at any --ruler-length; take a tokenizer with longer tokens, or other tasks"
        )
    [example] = vt_utils.sys_vartrack_w_noise_random(tokenizer, 1, EXAMPLE, incremental=5)
    before = f"{example['input']} {' '.join(example['outputs'])}\n\n"
    text, variables = vt_utils.generate_input_output(10, 1, 4)
    return _count(tokenizer, before) + _count(tokenizer, f"{text} {variables}") + 30


def _common_words(length: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Ten words, whose drawing leaves the generator's own as they are."""
    state = cwe_utils.RNG.getstate()
    example, text, answer = cwe_utils.generate_input_output(10, length)
    cwe_utils.RNG.setstate(state)
    answers = " ".join(f"{i}. {word}" for i, word in enumerate(answer, 1))
    return _count(tokenizer, f"{example}\n{text} {answers}") + 120


def _coded_words(_: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """So many that the three most frequent occur at all, by Zipf's law with exponent 2."""
    text = str(fwe_utils.TEMPLATE).format(context="... " * 17 + "abcdef " * 7, query="")
    return _count(tokenizer, text) + 50


SHORTEST: dict[str, Callable[[int, PreTrainedTokenizerBase], int]] = {
    "niah_single_1": partial(_needle, "repeat", "numbers"),
    "niah_multikey_2": partial(_needle, "needle", "numbers"),
    "niah_multikey_3": partial(_needle, "needle", "uuids"),
    "ruler_vt": _variables,
    "ruler_cwe": _common_words,
    "ruler_fwe": _coded_words,
}
"""Tokens of the shortest sample, the answer's with them, given the length asked for."""
