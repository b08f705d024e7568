"""Corpora: a split of a source as one array of tokens in the cache, opened as a memory map.

The cache is keyed by the path of the source, the (name, size, modification time in ns) of each of
its files, the split and the digest of the tokenizer: no text is read to find a corpus that is there
already, and a file that is edited, added or removed gives another key. A file changed without a
change of size and time is not seen; `memjax data` after removing the cache folder rebuilds it.
What checkpoints record, `Corpus.digest`, depends on names, text, split and tokenizer alone, so
the same data has the same digest on every machine.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from memjax.config import to_dict
from memjax.data import cache
from memjax.data.config import DEFAULT_BPE_SIZE, Data, cache_folder
from memjax.data.documents import Document, Source, split_name, unreadable
from memjax.data.errors import DataError
from memjax.data.generated import TaskCorpus, open_task
from memjax.data.progress import reading
from memjax.data.sources import open_source
from memjax.data.text import space_blocks, whole_lines
from memjax.data.tokenizers import Bpe, Bytes, Symbols, Tokenizer, Words

logger = logging.getLogger(__name__)

BPE_BYTES = 1 << 30  # text that BPE learns from; of a larger split, every n-th document


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """The tokens of a split.

    Document d is tokens[starts[d]:starts[d + 1]] and begins with `tokenizer.bos_id`; token i + 1 is
    predicted from the tokens up to i, so every token is a target once, except the bos_ids.

    starts  int64 [documents + 1].
    words   int64 [documents]: words as published perplexities count them (`count_words`).
    bytes   int64 [documents]: bytes of the original text.
    digest  names, text, split and tokenizer; equal digests mean equal tokens.
    """

    folder: Path
    source: str
    split: str
    tokenizer: Tokenizer
    dtype: str
    starts: np.ndarray
    names: Sequence[str]
    words: np.ndarray
    bytes: np.ndarray
    digest: str

    @cached_property
    def tokens(self) -> np.ndarray:
        """Every token, read-only; mapped at first use."""
        try:
            return np.memmap(self.folder / "tokens.bin", np.dtype(self.dtype), "r")
        except OSError as error:
            raise unreadable(self.folder / "tokens.bin", error, "run again") from None

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map would hold its whole file.
        return {name: value for name, value in self.__dict__.items() if name != "tokens"}

    @property
    def number_of_targets(self) -> int:
        """Tokens that are predicted: all but the `bos_id` of each document."""
        return int(self.starts[-1]) - len(self.names)


def open_data(config: Data, split: str, tokenizer: Tokenizer | None = None) -> Corpus | TaskCorpus:
    """The split of a corpus, or of a task: see `open_corpus` and `memjax.data.generated`."""
    if config.task is not None:
        return open_task(config, split)
    return open_corpus(config, split, tokenizer)


def open_corpus(config: Data, split: str, tokenizer: Tokenizer | None = None) -> Corpus:
    """Open a split ("train", "valid", "test" or "all"), building its cache if need be.

    `tokenizer`: that of a trained model, to evaluate it on this data; None means that of `config`.
    Raises DataError if the source or the cache cannot be used.
    """
    source = open_source(config)
    tokenizer = tokenizer or _tokenizer(config, source)
    return _open(config, source, split_name(split), tokenizer, verify=False)


def load_tokenizer(config: Data) -> Tokenizer:
    """The tokenizer of `config`, trained on its training split the first time."""
    if config.task is not None:
        return Symbols(config.task.vocab_size)
    return Bytes() if config.tokenizer == "bytes" else _tokenizer(config, open_source(config))


def describe(config: Data) -> dict[str, Any]:
    """Sizes of every split, as JSON values; builds and fully verifies the cache."""
    if config.task is not None:
        vocabulary = config.task.vocab_size
        return {"source": "task", "task": to_dict(config.task), "vocabulary": vocabulary}
    source = open_source(config)
    tokenizer = _tokenizer(config, source)
    splits = {}
    for split in source.splits:
        corpus = _open(config, source, split, tokenizer, verify=True)
        splits[split] = {
            "documents": len(corpus.names),
            "tokens": corpus.number_of_targets,
            "words": int(corpus.words.sum()),
            "bytes": int(corpus.bytes.sum()),
            "digest": corpus.digest,
            "cache": str(corpus.folder),
        }
    return {
        "source": config.source,
        "path": str(source.root),
        "tokenizer": config.tokenizer,
        "vocabulary": tokenizer.vocab_size,
        "cache": str(cache_folder(config)),
        "splits": splits,
    }


def _open(
    config: Data, source: Source, split: str, tokenizer: Tokenizer, *, verify: bool
) -> Corpus:
    documents = source.documents(split)
    key = _key(source, documents, split, tokenizer.digest)
    folder = cache_folder(config) / "corpora" / f"{source.kind}-{split}-{key}"
    try:
        if not folder.exists():
            cache.build(folder, documents, tokenizer, source.kind, split)
        header, index = cache.read(folder, verify=verify)
    except cache.Damaged as damage:
        logger.warning("cache %s is damaged: %s; building it again", folder, damage)
        cache.build(folder, documents, tokenizer, source.kind, split)
        header, index = _read_rebuilt(folder)
    identity = json.dumps([cache.FORMAT, header.content, header.split, header.tokenizer])
    return Corpus(
        folder=folder,
        source=source.kind,
        split=split,
        tokenizer=tokenizer,
        dtype=header.dtype,
        starts=np.concatenate([[0], np.cumsum(np.array(index.tokens, np.int64))]),
        names=index.names,
        words=np.array(index.words, np.int64),
        bytes=np.array(index.bytes, np.int64),
        digest=hashlib.sha256(identity.encode()).hexdigest(),
    )


def _read_rebuilt(folder: Path) -> tuple[cache.Header, cache.Index]:
    try:
        return cache.read(folder, verify=True)
    except cache.Damaged as damage:
        raise DataError(
            f"cache {folder} is damaged again after a rebuild: {damage}; check the disk, or set "
            "data.cache to another folder"
        ) from None


def _key(source: Source, documents: Sequence[Document], *more: object) -> str:
    """Names the documents by (name, cut, file, size, modification time), without reading them."""
    files = []
    for document in documents:
        stat = _stat(document.path)
        cut = (document.start, document.stop)
        files.append((document.name, *cut, stat.st_size, stat.st_mtime_ns))
    extra = [(path.name, _stat(path).st_mtime_ns) for path in source.extra]
    identity = [cache.FORMAT, source.kind, str(source.root.resolve()), files, extra, *more]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]


def _stat(path: Path):
    try:
        return path.stat()
    except OSError as error:
        raise unreadable(path, error) from None


def _tokenizer(config: Data, source: Source) -> Tokenizer:
    if config.tokenizer == "bytes":
        return Bytes()
    documents = source.documents("train")
    size = config.vocab_size
    if config.tokenizer == "bpe":
        size = size or DEFAULT_BPE_SIZE
    key = _key(source, documents, config.tokenizer, size)
    path = cache_folder(config) / "tokenizers" / f"{config.tokenizer}-{source.kind}-{key}.json"
    if path.exists():
        try:
            return Tokenizer.load(path)
        except DataError as error:
            logger.warning("%s; learning it again", error)
    tokenizer = _train(config.tokenizer, documents, size)
    try:
        path.parent.mkdir(exist_ok=True)
        cache.remove_stale(path.parent)
    except OSError as error:
        raise cache.cache_error(path.parent, error) from None
    tokenizer.save(path)
    return tokenizer


def _train(kind: str, documents: Sequence[Document], size: int | None) -> Tokenizer:
    def total(chosen: Sequence[Document]) -> int:
        return sum(document.stop - document.start for document in chosen)

    if kind == "bpe":
        documents = documents[:: -(-total(documents) // BPE_BYTES)]
    # Cuts that neither tokenizer can see: whole lines for words, before white space for BPE.
    blocks = whole_lines if kind == "words" else space_blocks
    with reading(f"learning the {kind} vocabulary", total(documents)) as advance:

        def texts():
            for document in documents:
                for block in blocks(document.read()):
                    yield block
                    advance(len(block))

        if kind == "words":
            return Words.train(texts(), size)
        return Bpe.train(texts(), size or DEFAULT_BPE_SIZE)
