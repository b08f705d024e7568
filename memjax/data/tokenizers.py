"""Tokenizers: bytes, byte-level BPE, the words of WikiText, and the symbols of a task.

Each turns the bytes of a document into ids and back. `bos_id` opens every document of a corpus and
is never predicted; `encode` does not add it.
"""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, SupportsInt

import numpy as np
from jaxtyping import Int32
from tokenizers import Tokenizer as HubTokenizer
from tokenizers import models, pre_tokenizers, trainers

from memjax.data.errors import DataError
from memjax.data.text import BLOCK, line_blocks, space_blocks

FORMAT = 1
PART = ".part-"  # begins the name of a file or folder of the cache that is not complete
UNKNOWN, END_OF_LINE = "<unk>", "<eos>"


class Tokenizer(ABC):
    """Bytes of text to ids and back.

    vocab_size   ids are below it, `bos_id` included.
    bos_id       the id that opens a document.
    """

    kind: str
    vocab_size: int
    bos_id: int

    @abstractmethod
    def blocks(self, text: bytes) -> Iterator[tuple[int, np.ndarray]]:
        """(bytes read, their ids) of consecutive parts of UTF-8 `text`, in little memory."""

    def encode(self, text: bytes) -> Int32[np.ndarray, "tokens"]:
        """Ids of UTF-8 `text`, without `bos_id`."""
        return np.concatenate([np.zeros(0, np.int32), *(ids for _, ids in self.blocks(text))])

    @abstractmethod
    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """Text of `ids`; broken UTF-8 becomes U+FFFD. Raises DataError for an unknown id."""

    @abstractmethod
    def content(self) -> dict[str, Any]:
        """What `from_content` of the same class needs, as JSON values."""

    @classmethod
    @abstractmethod
    def from_content(cls, content: Mapping[str, Any]) -> "Tokenizer":
        """The tokenizer that gave `content`."""

    @property
    def digest(self) -> str:
        """SHA-256 of the saved form: equal digests give equal ids."""
        return hashlib.sha256(self._json().encode()).hexdigest()

    def _json(self) -> str:
        header = {"format": FORMAT, "kind": self.kind}
        return json.dumps(header | self.content(), sort_keys=True, separators=(",", ":"))

    def save(self, path: str | Path) -> None:
        """Write JSON that `load` reads; the file appears whole or not at all."""
        path = Path(path)
        part = path.with_name(f"{PART}{path.name}-{os.getpid()}-{os.urandom(4).hex()}")
        try:
            part.write_text(self._json(), encoding="utf-8")
            part.replace(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            remedy = "make room there, or choose another folder"
            raise DataError(f"{path} cannot be written ({error.strerror}); {remedy}") from None

    @staticmethod
    def load(path: str | Path) -> "Tokenizer":
        """The tokenizer saved at `path`. Raises DataError if the file is missing or damaged."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']}, expected {FORMAT}")
            return TOKENIZERS[content["kind"]].from_content(content)
        except OSError as error:
            raise DataError(
                f"tokenizer {path} cannot be read ({error.strerror}); check that it is there"
            ) from None
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise DataError(
                f"tokenizer {path} is damaged ({type(error).__name__}: {error}); remove it"
            ) from None

    def _checked(self, ids: Iterable[SupportsInt]) -> list[int]:
        checked = [int(i) for i in ids]
        for i in checked:
            if not 0 <= i < self.vocab_size:
                raise DataError(f"token id {i} is not in the vocabulary [0, {self.vocab_size})")
        return checked


class Bytes(Tokenizer):
    """Ids 0..255 are the bytes of the text; 256 opens a document."""

    kind = "bytes"
    vocab_size = 257
    bos_id = 256

    def blocks(self, text: bytes) -> Iterator[tuple[int, np.ndarray]]:
        for start in range(0, len(text), BLOCK):
            part = text[start : start + BLOCK]
            yield len(part), np.frombuffer(part, np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        checked = self._checked(ids)
        return bytes(i for i in checked if i != self.bos_id).decode("utf-8", errors="replace")

    def content(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_content(cls, content: Mapping[str, Any]) -> "Bytes":
        return cls()


def _byte_of_symbol() -> dict[str, int]:
    """Byte of each printable symbol of the byte-level alphabet.

    Printable Latin-1 bytes stand for themselves; the others, in order, for U+0100 and on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + n): byte for n, byte in enumerate(others)
    }


class Bpe(Tokenizer):
    """Byte-level BPE without normaliser or added spaces: decoding gives the text back exactly.

    merges   pairs of byte strings in the order in which they were learned. Ids 0..255 are the byte
             symbols in the order of the library's alphabet, 256 + n the n-th merge; the last id
             opens a document and cannot come out of any text.
    """

    kind = "bpe"
    _BLOCK, _GROUP = 1 << 17, 16  # bytes a call and calls at once: bounds the memory of encoding

    def __init__(self, vocabulary: Sequence[str], merges: Sequence[Sequence[str]]):
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else a warning at each fork
        self._vocabulary, self._merges = list(vocabulary), [(left, right) for left, right in merges]
        ids = {symbol: i for i, symbol in enumerate(self._vocabulary)}
        try:
            self._model = HubTokenizer(models.BPE(vocab=ids, merges=self._merges))
        except Exception as error:  # the library raises bare Exception for a bad merge
            raise ValueError(f"merges and vocabulary do not agree: {error}") from None
        self._model.pre_tokenizer = _byte_level()
        table = _byte_of_symbol()
        self._bytes = [bytes(table[c] for c in symbol) for symbol in self._vocabulary]
        self.bos_id = len(self._vocabulary)
        self.vocab_size = self.bos_id + 1

    @classmethod
    def train(cls, texts: Iterable[bytes], vocab_size: int) -> "Bpe":
        """Learn merges until there are `vocab_size` ids, `bos_id` included, or no pair repeats."""
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        model = HubTokenizer(models.BPE())
        model.pre_tokenizer = _byte_level()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=[],
            show_progress=False,
        )
        blocks = (block.decode() for text in texts for block in space_blocks(text, cls._BLOCK))
        model.train_from_iterator(blocks, trainer)
        learned = json.loads(model.to_str())["model"]
        vocabulary = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
        return cls(vocabulary, learned["merges"])

    def blocks(self, text: bytes) -> Iterator[tuple[int, np.ndarray]]:
        blocks = space_blocks(text, self._BLOCK)
        while group := list(islice(blocks, self._GROUP)):
            encoded = self._model.encode_batch_fast([block.decode() for block in group])
            parts = [np.asarray(encoding.ids, np.int32) for encoding in encoded]
            yield sum(map(len, group)), np.concatenate(parts)

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        checked = self._checked(ids)
        text = b"".join(self._bytes[i] for i in checked if i != self.bos_id)
        return text.decode("utf-8", errors="replace")

    def content(self) -> dict[str, Any]:
        return {"vocabulary": self._vocabulary, "merges": self._merges}

    @classmethod
    def from_content(cls, content: Mapping[str, Any]) -> "Bpe":
        return cls(content["vocabulary"], content["merges"])


def _byte_level() -> pre_tokenizers.ByteLevel:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


class Words(Tokenizer):
    """The WikiText protocol: words between white space and `<eos>` at the end of each line.

    Case is kept; a blank line is a lone `<eos>`; a word outside the vocabulary is `<unk>`.
    `<eos>` also opens a document, so that the first word is predicted from a line end.
    """

    kind = "words"

    def __init__(self, words: Sequence[str]):
        self._words = list(words)
        self._ids = {word: i for i, word in enumerate(self._words)}
        if len(self._ids) != len(self._words):
            raise ValueError("a word is there twice")
        self._unknown = self._ids[UNKNOWN]
        self.bos_id = self._ids[END_OF_LINE]
        self.vocab_size = len(self._words)

    @classmethod
    def train(cls, texts: Iterable[bytes], vocab_size: int | None = None) -> "Words":
        """Every word of `texts`, the most frequent first, then by first appearance.

        `<eos>` and `<unk>` are always there; `vocab_size` drops the rarest of the others.
        """
        counts: Counter[str] = Counter()
        for text in texts:
            for _, words in _words(text):
                counts.update(words)
        ranked = [word for word, _ in counts.most_common()]
        special = [word for word in (END_OF_LINE, UNKNOWN) if word not in counts]
        if vocab_size is not None and len(ranked) + len(special) > vocab_size:
            common = [word for word in ranked if word not in (END_OF_LINE, UNKNOWN)]
            dropped = set(common[vocab_size - 2 :])
            ranked = [word for word in ranked if word not in dropped]
        return cls(ranked + special)

    def blocks(self, text: bytes) -> Iterator[tuple[int, np.ndarray]]:
        known, unknown = self._ids.get, self._unknown
        for size, words in _words(text):
            yield size, np.array([known(word, unknown) for word in words], np.int32)

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """Words with single spaces between them; `<eos>` ends a line."""
        words = [self._words[i] for i in self._checked(ids)]
        lines = " ".join("\n" if word == END_OF_LINE else word for word in words)
        return lines.replace(" \n", "\n").replace("\n ", "\n")

    def content(self) -> dict[str, Any]:
        return {"words": self._words}

    @classmethod
    def from_content(cls, content: Mapping[str, Any]) -> "Words":
        return cls(content["words"])


def _words(text: bytes) -> Iterator[tuple[int, list[str]]]:
    """(bytes, words and line ends) of blocks of whole lines."""
    for _, block in line_blocks(text):
        lines = block.decode("utf-8")
        ended = lines if lines.endswith("\n") else lines + "\n"
        yield len(block), ended.replace("\n", f" {END_OF_LINE} ").split()


class Symbols(Tokenizer):
    """The symbols of a task: ids as decimal numbers between spaces."""

    kind = "symbols"
    bos_id = 0

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def blocks(self, text: bytes) -> Iterator[tuple[int, np.ndarray]]:
        try:
            ids = self._checked(int(word) for word in text.split())
        except ValueError as error:
            raise DataError(f"symbols of a task are numbers between spaces: {error}") from None
        yield len(text), np.array(ids, np.int32)

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        return "".join(f"{i} " for i in self._checked(ids))

    def content(self) -> dict[str, Any]:
        return {"vocab_size": self.vocab_size}

    @classmethod
    def from_content(cls, content: Mapping[str, Any]) -> "Symbols":
        return cls(int(content["vocab_size"]))


TOKENIZERS: Mapping[str, type[Tokenizer]] = {
    "bytes": Bytes,
    "bpe": Bpe,
    "words": Words,
    "symbols": Symbols,
}
