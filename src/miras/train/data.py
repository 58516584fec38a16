"""Tokens: the tokenizer, the token cache, and what a run reads of a corpus."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from miras.train.config import DataSection
from miras.train.corpus import Corpus, Document, open_corpus
from miras.train.rows import Blocks, Tokens, flatten, row, stack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEPARATOR = "<|endoftext|>"
STREAMED_TOKENIZER_DOCUMENTS = 20_000  # a stream has no end to train the tokenizer on
CACHE_VERSION = 2
MAX_NAMES = 64  # of documents, kept for the report


class StreamedBlocks(IterableDataset[dict[str, torch.Tensor]]):
    """The rows of `Blocks`, made from documents as they arrive; `documents` is called anew for every pass."""

    def __init__(
        self,
        documents: Callable[[], Iterable[Document]],
        tokenizer: PreTrainedTokenizerBase,
        data: DataSection,
    ) -> None:
        self.documents, self.tokenizer, self.data = documents, tokenizer, data

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        size, separator = self.data.block_size, separator_id(self.tokenizer)
        ids, starts = np.zeros(0, np.int64), np.zeros(0, np.int64)
        for encoded, _ in encode(self.documents(), self.tokenizer):
            starts = np.append(starts, len(ids))
            ids = np.append(ids, encoded)
            while len(ids) >= size:
                yield row(ids[:size], starts[starts < size], size, self.data.isolate_documents, separator)
                ids, starts = ids[size:], starts[starts >= size] - size
        if len(ids):
            yield row(ids, starts, size, self.data.isolate_documents, separator)


@dataclass(frozen=True)
class Prepared:
    """What a run reads: the tokenizer, the training rows with their collate function, and the held-out tokens."""

    tokenizer: PreTrainedTokenizerBase
    train: Dataset[dict[str, torch.Tensor]]
    validation: Tokens
    collate: Callable[[list[dict[str, torch.Tensor]]], dict[str, torch.Tensor]]
    train_tokens: int | None


def prepare(data: DataSection) -> Prepared:
    """Tokenise the corpus, or find it in the cache, and cut it into training rows.

    Raises as `open_corpus`; ValueError if either split is too short for one row of two tokens.
    """
    corpus = open_corpus(data)
    collate = flatten if data.isolate_documents else stack
    if corpus.fingerprint is None:
        return _prepare_stream(corpus, data, collate)
    folder = _cached(corpus, data)
    tokenizer = load_tokenizer(folder / "tokenizer")
    train, validation = read_tokens(folder / "train"), read_tokens(folder / "validation")
    if len(train) < 2 or len(validation) < 2:
        raise ValueError(f"{corpus.name}: {len(train)} training and {len(validation)} validation tokens are too few")
    blocks = Blocks(train, data.block_size, data.isolate_documents, separator_id(tokenizer))
    return Prepared(tokenizer, blocks, validation, collate, len(train))


def _prepare_stream(corpus: Corpus, data: DataSection, collate: Callable[..., Any]) -> Prepared:
    tokenizer = make_tokenizer(data, islice(corpus.train(), STREAMED_TOKENIZER_DOCUMENTS))
    encoded = list(encode(corpus.validation(), tokenizer))
    if not encoded:
        raise ValueError(f"{corpus.name}: no documents in the stream")
    validation = Tokens(
        np.concatenate([ids for ids, _ in encoded]),
        np.cumsum([0, *(len(ids) for ids, _ in encoded)])[:-1],
        sum(size for _, size in encoded),
    )
    return Prepared(tokenizer, StreamedBlocks(corpus.train, tokenizer, data), validation, collate, None)


def tokenize(documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """Documents as tokens in memory, without the cache."""
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(Path(folder), documents, tokenizer)
        tokens = read_tokens(Path(folder))
        return Tokens(np.array(tokens.ids), tokens.starts, tokens.text_bytes, tokens.names)


def encode(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, batch: int = 256
) -> Iterator[tuple[np.ndarray, int]]:
    """Each document's ids, the separator first, and the number of bytes of its text."""
    separator, source = separator_id(tokenizer), iter(documents)
    while chunk := [document.text for document in islice(source, batch)]:
        encoded = tokenizer(chunk, add_special_tokens=False, verbose=False, return_attention_mask=False)
        for ids, text in zip(encoded["input_ids"], chunk, strict=True):
            yield np.asarray([separator, *ids], np.int64), len(text.encode("utf-8"))


def make_tokenizer(data: DataSection, documents: Iterable[Document]) -> PreTrainedTokenizerBase:
    """A byte-level BPE trained on `documents` if data.tokenizer is `bpe`, else the one at that path or hub name."""
    if data.tokenizer != "bpe":
        return load_tokenizer(data.tokenizer)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=data.vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((document.text for document in documents), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{SEPARATOR} $A", pair=f"{SEPARATOR} $A {SEPARATOR} $B", special_tokens=[(SEPARATOR, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=SEPARATOR, eos_token=SEPARATOR)


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved at a path or published under a hub name. Raises ValueError if there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(source))
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer at {source}: give `bpe`, a folder with tokenizer.json or a hub name") from error


def separator_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that begins every document. Raises ValueError for a tokenizer with neither bos nor eos token."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    raise ValueError("the tokenizer has neither a bos nor an eos token to begin documents with; give it one")


def write_tokens(folder: Path, documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> None:
    """Tokenise into `folder`: ids.bin (uint16 or uint32), starts.npy and meta.json."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    names: list[str] = []
    starts, count, text_bytes = [], 0, 0

    def named() -> Iterator[Document]:
        for document in documents:
            names.append(document.name)
            yield document

    with (folder / "ids.bin").open("wb") as file:
        for ids, size in encode(named(), tokenizer):
            starts.append(count)
            count, text_bytes = count + len(ids), text_bytes + size
            file.write(ids.astype(dtype).tobytes())
    np.save(folder / "starts.npy", np.asarray(starts, np.int64))
    meta = {"dtype": np.dtype(dtype).name, "text_bytes": text_bytes, "names": names[:MAX_NAMES]}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def read_tokens(folder: Path) -> Tokens:
    """The tokens that `write_tokens` wrote, memory-mapped."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    starts = np.load(folder / "starts.npy")
    ids = np.memmap(folder / "ids.bin", dtype=meta["dtype"], mode="r") if len(starts) else np.zeros(0, meta["dtype"])
    return Tokens(ids, starts, meta["text_bytes"], tuple(meta["names"]))


def _cached(corpus: Corpus, data: DataSection) -> Path:
    """The folder with the tokenised corpus, made if it is not there yet; it appears whole or not at all."""
    tokenizer = None if data.tokenizer == "bpe" else load_tokenizer(data.tokenizer)
    identity = [CACHE_VERSION, corpus.fingerprint, data.holdout, data.text_field]
    identity += [data.vocab_size] if tokenizer is None else [_tokenizer_hash(tokenizer)]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
    folder = cache_folder() / f"tokens-{key}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix="building-", dir=folder.parent))
    try:
        tokenizer = tokenizer or make_tokenizer(data, corpus.train())
        tokenizer.save_pretrained(building / "tokenizer")
        write_tokens(building / "train", corpus.train(), tokenizer)
        write_tokens(building / "validation", corpus.validation(), tokenizer)
        building.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process finished the same work first
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{content}{separator_id(tokenizer)}".encode()).hexdigest()


def cache_folder() -> Path:
    """Where tokenised corpora are kept: $MIRAS_CACHE, or `miras` in the XDG cache folder."""
    if "MIRAS_CACHE" in os.environ:
        return Path(os.environ["MIRAS_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "miras"
