"""What an evaluation found: one sum of nats, the counts that divide it, and perplexities."""

import dataclasses
import math
from typing import Any

OFFICIAL_WORDS = {
    ("wikitext", "valid"): (None, 217_646),
    ("wikitext", "test"): (None, 245_569),
    ("pg19", "valid"): (50, 3_007_061),
    ("pg19", "test"): (100, 6_966_499),
}
"""(task, split) -> documents of the full benchmark (None: any), words of published perplexities."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """Perplexity of a model on a split, or on the part of it that was scored.

    documents, tokens, words, bytes: of what was scored; tokens counts every target once. words and
        bytes are those of the original text (WikiText: one `<eos>` a line), None where a document
        was cut and they are not known exactly.
    nll_nats: sum of -log p(token) over all targets, in nats.
    whole: whether all documents of the split were scored, to their ends.
    lossless: whether the tokens give the text back.
    step: training step of the parameters, if known.
    seconds: wall time, compilation included.
    per_document: (name, tokens, nats) in the order of the corpus.
    positions: (first, last, tokens, nats) of targets whose position in their document (the first
        target is 1) is in [first, last]; the buckets double.
    """

    task: str
    split: str
    protocol: str
    context: int
    stride: int | None
    carry: bool
    documents: int
    tokens: int
    words: int | None
    bytes: int | None
    nll_nats: float
    whole: bool
    lossless: bool
    step: int | None
    seconds: float
    per_document: tuple[tuple[str, int, float], ...]
    positions: tuple[tuple[int, int, int, float], ...]

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nll_nats / self.tokens

    @property
    def token_perplexity(self) -> float:
        return _exp(self.loss)

    @property
    def word_perplexity(self) -> float | None:
        """exp(nats / words): one division, whatever the tokens are."""
        return _exp(self.nll_nats / self.words) if self.words else None

    @property
    def bits_per_byte(self) -> float | None:
        """Bits a byte of the original text."""
        return self.nll_nats / (math.log(2) * self.bytes) if self.bytes else None

    @property
    def official(self) -> dict[str, Any] | None:
        """Word perplexity with the published divisor, if this is the whole benchmark."""
        documents, words = OFFICIAL_WORDS.get((self.task, self.split), (None, None))
        complete = documents in (None, self.documents) and self.whole
        if words is None or not complete:
            return None
        if self.task == "wikitext" and self.words != words:
            return None
        return {"words": words, "word_perplexity": _finite(_exp(self.nll_nats / words))}

    def notes(self) -> list[str]:
        """What a reader must know before comparing the figures."""
        notes = []
        if not self.whole:
            notes.append(f"only the start of the split was scored: {self.tokens} tokens")
        documents, words = OFFICIAL_WORDS.get((self.task, self.split), (None, None))
        if words is not None and self.official is None:
            full = f"{documents} documents, " if documents else ""
            notes.append(
                f"not the full {self.task} {self.split} split ({full}{words} words): "
                "not comparable with published results"
            )
        if not self.lossless:
            notes.append(
                "the words tokenizer does not give the text back (<unk>, white space): "
                "bits_per_byte is not comparable with that of bytes or BPE"
            )
        if not math.isfinite(self.nll_nats):
            notes.append("the model gave logits that are not finite: nll_nats is null")
        elif not all(map(math.isfinite, (self.token_perplexity, self.word_perplexity or 1.0))):
            notes.append("a perplexity above 1e308 is null")
        return notes

    def to_dict(self) -> dict[str, Any]:
        """JSON values; a number that is not finite, or not known, is null and has a note."""
        return {
            "task": self.task,
            "split": self.split,
            "protocol": self.protocol,
            "context": self.context,
            "stride": self.stride,
            "carry": self.carry,
            "documents": self.documents,
            "tokens": self.tokens,
            "words": self.words,
            "bytes": self.bytes,
            "nll_nats": _finite(self.nll_nats),
            "word_perplexity": _finite(self.word_perplexity),
            "token_perplexity": _finite(self.token_perplexity),
            "bits_per_byte": _finite(self.bits_per_byte),
            "step": self.step,
            "seconds": self.seconds,
            "tokens_per_s": self.tokens / max(self.seconds, 1e-9),
            "whole_split": self.whole,
            "official": self.official,
            "notes": self.notes(),
            "positions": [
                {"first": first, "last": last, "tokens": tokens, "loss": _finite(nats / tokens)}
                for first, last, tokens, nats in self.positions
            ],
            "per_document": [
                {"name": name, "tokens": tokens, "nll_nats": _finite(nats)}
                for name, tokens, nats in self.per_document
            ],
        }


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
