"""Sums of an evaluation, in float64 on the host, and the counts that go with them."""

import dataclasses
from typing import Any

import numpy as np

from memjax.data import Corpus
from memjax.evals.protocols import LOSSLESS, Batch, Protocol, Span, text_of
from memjax.evals.result import Result

BUCKETS = 64


@dataclasses.dataclass
class Totals:
    """Sums in float64: a document, and a bucket of positions (bucket i ends before 2^(i + 1))."""

    documents: int

    def __post_init__(self):
        self.nats = np.zeros(self.documents)
        self.tokens = np.zeros(self.documents, np.int64)
        self.bucket_nats, self.bucket_tokens = np.zeros(BUCKETS), np.zeros(BUCKETS, np.int64)

    def add(self, batch: Batch, nll_BT: Any) -> int:
        """Add what the windows of a batch score; returns the number of tokens."""
        before = int(self.tokens.sum())
        wide_BT = np.asarray(nll_BT, np.float64)
        for lane, window in enumerate(batch.windows):
            if window is None:
                continue
            nats = wide_BT[lane, window.skip : window.length]
            self.nats[window.document] += nats.sum()
            self.tokens[window.document] += len(nats)
            position = np.arange(window.start + window.skip, window.start + window.length) + 1
            bucket = np.frexp(position)[1] - 1
            self.bucket_nats += np.bincount(bucket, nats, BUCKETS)
            self.bucket_tokens += np.bincount(bucket, minlength=BUCKETS)
        return int(self.tokens.sum()) - before

    def result(
        self,
        corpus: Corpus,
        protocol: Protocol,
        spans: list[Span],
        *,
        step: int | None,
        seconds: float,
    ) -> Result:
        words, size = _counts(corpus, spans)
        used = np.flatnonzero(self.bucket_tokens)
        return Result(
            task=corpus.source,
            split=corpus.split,
            protocol=protocol.name,
            context=protocol.context,
            stride=protocol.stride,
            carry=protocol.carry,
            documents=len(spans),
            tokens=int(self.tokens.sum()),
            words=words,
            bytes=size,
            nll_nats=float(self.nats.sum()),
            whole=len(spans) == len(corpus.names) and all(span.whole for span in spans),
            lossless=corpus.tokenizer.kind in LOSSLESS,
            step=step,
            seconds=seconds,
            per_document=tuple(
                (corpus.names[d], int(self.tokens[d]), float(self.nats[d])) for d, _, _ in spans
            ),
            positions=tuple(
                (1 << i, (1 << i + 1) - 1, int(self.bucket_tokens[i]), float(self.bucket_nats[i]))
                for i in map(int, used)
            ),
        )


def _counts(corpus: Corpus, spans: list[Span]) -> tuple[int | None, int | None]:
    """Words and bytes of the spans; None where a cut document leaves them unknown."""
    words = sum(int(corpus.words[span.document]) for span in spans if span.whole)
    size = sum(int(corpus.bytes[span.document]) for span in spans if span.whole)
    cut = [span for span in spans if not span.whole]
    if not cut:
        return words, size
    lossless = corpus.tokenizer.kind in LOSSLESS
    size += sum(len(text_of(corpus, s.document, s.targets).encode()) for s in cut if lossless)
    words_are_tokens = corpus.source == "wikitext" and corpus.tokenizer.kind == "words"
    words += sum(span.targets for span in cut)
    return words if words_are_tokens else None, size if lossless else None
