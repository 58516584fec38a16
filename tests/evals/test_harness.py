"""The harness' scores are those of the logits, whatever the padding and the batch; what it cannot do, it says first."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import requests
import torch
from lm_eval.tasks.ruler import vt_utils
from transformers import PreTrainedTokenizerBase

from miras.evals.harness import HarnessModel, Row, run_tasks, save
from miras.train.config import DataSection
from miras.train.corpus import Document
from miras.train.data import make_tokenizer
from tests.evals.tasks import QUESTIONS, log_likelihood, make, make_words_tokenizer, write_multiple_choice, write_task

NAMES = ("yaad", "moneta", "memora", "titans_lmm", "gated_deltanet", "transformer")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return make_words_tokenizer()


@pytest.fixture(autouse=True)
def _own_data_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv("MIRAS_CACHE", str(tmp_path / "miras"))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def _request(*args: Any) -> SimpleNamespace:
    return SimpleNamespace(args=args)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text)["input_ids"]


def _by_hand(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[list[float]]:
    """Each question's choices: the separator, the prompt, then what the choice adds."""
    scores = []
    for row in QUESTIONS:
        context = _ids(tokenizer, row["input"])
        assert context[0] == tokenizer.bos_token_id
        whole = [_ids(tokenizer, f"{row['input']} {choice}") for choice in row["choices"]]
        scores.append([log_likelihood(model, context, ids[len(context) :]) for ids in whole])
    return scores


@pytest.mark.parametrize("name", NAMES)
def test_likelihoods_do_not_depend_on_the_batch(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    model = make(name, tokenizer)
    want = [score for scores in _by_hand(model, tokenizer) for score in scores]
    assert len({round(x, 6) for x in want}) == len(want)
    requests = [_request(row["input"], f" {choice}") for row in QUESTIONS for choice in row["choices"]]
    for batch_size in (1, 3, 12):
        got = HarnessModel(model, tokenizer, batch_size).loglikelihood(requests, disable_tqdm=True)
        assert [x for x, _ in got] == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_accuracies_are_those_of_the_logits(batch_size: int, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    write_multiple_choice(tmp_path / "tasks")
    model = make("yaad", tokenizer)
    scores = _by_hand(model, tokenizer)
    right = [int(np.argmax(s)) == row["answer"] for s, row in zip(scores, QUESTIONS, strict=True)]
    by_length = [
        int(np.argmax([x / len(choice) for x, choice in zip(s, row["choices"], strict=True)])) == row["answer"]
        for s, row in zip(scores, QUESTIONS, strict=True)
    ]
    assert right != by_length
    model.train()
    rows = run_tasks(model, tokenizer, ["questions"], batch_size=batch_size, include=tmp_path / "tasks")
    assert model.training
    chance = (2 / 3 + 3 / 2) / 5
    want = {"acc": np.mean(right), "acc_norm": np.mean(by_length)}
    assert {row.metric: row.value for row in rows} == pytest.approx(want)
    assert all((row.task, row.n, row.chance) == ("questions", 5, pytest.approx(chance)) for row in rows)
    assert rows[0].stderr == pytest.approx(np.std(right, ddof=1) / math.sqrt(5))
    limited = run_tasks(model, tokenizer, ["questions"], limit=2, include=tmp_path / "tasks")
    assert (limited[0].n, limited[0].value) == (2, np.mean(right[:2]))
    assert limited[0].chance == pytest.approx((1 / 3 + 1 / 2) / 2)


@pytest.mark.parametrize("block_size", [None, 7])
def test_documents_are_scored_in_windows_without_the_separator(
    block_size: int | None, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    texts = ["the king and the queen do speak of all fair words", "no more than words"]
    about = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{page}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    }
    write_task(tmp_path / "tasks", "pages", [{"page": text} for text in texts], about)
    model = make("yaad", tokenizer)
    total = 0.0
    for text in texts:
        separator, *ids = _ids(tokenizer, text)
        size = block_size or len(ids)
        starts = [0] if block_size is None else list(range(0, len(ids) - size + 1, size))
        for start in starts:
            before = separator if start == 0 else ids[start - 1]
            total += log_likelihood(model, [before], ids[start : start + size])
        rest = len(ids) - (starts[-1] + size if starts else 0)
        if rest:  # the last window is full too, but only what is new in it counts
            window = ([separator, *ids])[-(size + 1) :]
            total += log_likelihood(model, window[: len(window) - rest], window[len(window) - rest :])
    rows = run_tasks(model, tokenizer, ["pages"], block_size=block_size, include=tmp_path / "tasks")
    values = {row.metric: row.value for row in rows}
    words, size = sum(len(text.split()) for text in texts), sum(len(text) for text in texts)
    want = {"word_perplexity": math.exp(-total / words), "bits_per_byte": -total / size / math.log(2)}
    assert values == pytest.approx(want, rel=1e-9)
    assert {row.chance for row in rows} == {None}


def test_contexts_have_no_end_unless_one_is_given(tokenizer: PreTrainedTokenizerBase) -> None:
    model = make("gated_deltanet", tokenizer)
    prompt, choice = "the king and the queen " * 900, " speak"
    ids, tail = _ids(tokenizer, prompt.strip()), _ids(tokenizer, prompt.strip() + choice)
    assert len(ids) > 2048
    new = tail[len(ids) :]
    for block_size, context in ((None, ids), (9, ids[-(10 - len(new)) :])):
        [(got, _)] = HarnessModel(model, tokenizer, 1, block_size).loglikelihood(
            [_request(prompt.strip(), choice)], disable_tqdm=True
        )
        assert got == pytest.approx(log_likelihood(model, context, new), abs=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_generation_does_not_depend_on_the_batch(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    model = make(name, tokenizer)
    options = {"until": [], "max_gen_toks": 6, "do_sample": False}
    requests = [_request(row["input"], options) for row in QUESTIONS]
    alone, together = (
        HarnessModel(model, tokenizer, batch_size).generate_until(requests, disable_tqdm=True) for batch_size in (1, 5)
    )
    for row, text in zip(QUESTIONS, alone, strict=True):
        ids = torch.tensor([_ids(tokenizer, row["input"])])
        for _ in range(6):
            with torch.no_grad():
                ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
            if ids[0, -1] == tokenizer.eos_token_id:
                break
        assert text == tokenizer.decode(ids[0, len(_ids(tokenizer, row["input"])) :], skip_special_tokens=True)
    assert together == alone
    assert len(set(alone)) > 1


def test_stored_figures_replace_older_ones_of_the_same_task(tmp_path: Path) -> None:
    old = [Row("a", "acc", 0.5, 0.1, 10, 0.5), Row("b", "word_perplexity", 20.0, None, 3, None)]
    save(old, tmp_path, {"limit": 10})
    file = save([Row("a", "acc_norm", 0.75, 0.1, 20, 0.5)], tmp_path, {"limit": None})
    stored = json.loads(file.read_text())
    assert file == tmp_path / "evals.json"
    assert stored["a"]["metrics"] == {"acc_norm": {"value": 0.75, "stderr": 0.1, "chance": 0.5}}
    assert (stored["a"]["n"], stored["a"]["settings"]["limit"]) == (20, None)
    assert stored["b"]["metrics"]["word_perplexity"] == {"value": 20.0, "stderr": None, "chance": None}


def test_missing_data_and_tasks_are_named(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, no_network: None) -> None:
    model = make("yaad", tokenizer)
    folder = tmp_path / "tasks"
    write_multiple_choice(folder)
    hub = {"task": "elsewhere", "dataset_path": "nobody/nothing", "test_split": "test", "output_type": "multiple_choice"}
    (folder / "elsewhere.yaml").write_text(json.dumps(hub))
    with pytest.raises(FileNotFoundError, match=r"the data of task elsewhere is not on this machine.*HF_HOME"):
        run_tasks(model, tokenizer, ["questions", "elsewhere"], include=folder)
    (folder / "fetched.py").write_text(
        "import requests\ndef load(**_):\n    raise requests.ConnectionError('no such host')\n"
    )
    (folder / "fetched.yaml").write_text("{task: fetched, custom_dataset: !function fetched.load, test_split: test}")
    with pytest.raises(FileNotFoundError, match=r"task fetched .*\(no such host\).*in every run and keeps none") as refused:
        run_tasks(model, tokenizer, ["fetched"], include=folder)
    assert "HF_HOME" not in str(refused.value)
    with pytest.raises(FileNotFoundError, match=r"bigbench_social_iqa.*are not on this machine.*--download.*358 MB"):
        run_tasks(model, tokenizer, ["bigbench_social_iqa"])


@pytest.mark.slow
def test_the_harness_own_tasks_without_a_network(
    tokenizer: PreTrainedTokenizerBase, no_network: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get(*args: Any, **kwargs: Any) -> Any:
        raise requests.ConnectionError("no such host")

    monkeypatch.setattr("requests.get", get)
    model = make("yaad", tokenizer)
    with pytest.raises(FileNotFoundError, match=r"task ruler_qa_squad could not be fetched \(no such host\)"):
        run_tasks(model, tokenizer, ["ruler_qa_squad"])
    with pytest.raises(FileNotFoundError, match="the data of task piqa is not on this machine"):
        run_tasks(model, tokenizer, ["piqa"])
    with pytest.raises(ValueError, match=r"no task 'hellaswagg'; did you mean .*hellaswag"):
        run_tasks(model, tokenizer, ["hellaswagg"])
    with pytest.raises(ValueError, match="no task 'zzzz'; `lm_eval ls tasks` lists them"):
        run_tasks(model, tokenizer, ["zzzz"])


RULER = {"niah_single_1": 1536, "niah_multikey_2": 1536, "niah_multikey_3": 3072, "ruler_cwe": 3072, "ruler_fwe": 1024}
"""Tasks, and a length that their samples fit with the tokenizer of these tests."""


@pytest.mark.slow
@pytest.mark.parametrize(("task", "length"), RULER.items())
def test_samples_of_ruler_that_fit_run_and_others_are_refused(
    task: str, length: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = make("gated_deltanet", tokenizer)
    with pytest.raises(ValueError, match=rf"{task}: its shortest samples take about \d+ tokens.*do not fit 128"):
        run_tasks(model, tokenizer, [task], ruler_lengths=[4095, 128])
    rows = run_tasks(model, tokenizer, [task], ruler_lengths=[length], limit=1, batch_size=1)
    assert [(row.metric, row.n) for row in rows] == [(str(length), 1)]
    assert 0 <= rows[0].value <= 1


@pytest.mark.slow
def test_the_example_of_variable_tracking_has_to_fit(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match=r"ruler_vt: the example in its prompts takes about \d+ tokens.*leaves 500"):
        run_tasks(make("gated_deltanet", tokenizer), tokenizer, ["ruler_vt"])
    from miras.evals import ruler

    text, _ = vt_utils.generate_input_output(10, 1, 4)
    longer = make_tokenizer(DataSection(vocab_size=500), [Document("variables", text * 4)])
    with pytest.raises(ValueError, match=r"ruler_vt: its shortest samples take about \d+ tokens") as refused:
        ruler.check(["ruler_vt"], longer, [500])
    need = int(re.findall(r"about (\d+) tokens", str(refused.value))[0])
    length = need + 10  # Chains and their order vary.
    rows = run_tasks(make("gated_deltanet", longer), longer, ["ruler_vt"], ruler_lengths=[length], limit=1, batch_size=1)
    assert [(row.metric, row.n) for row in rows] == [(str(length), 1)]
