"""Which tokens are scored in which window: the protocols of perplexity.

A document is its tokens d[0] (bos), d[1], ..., d[n]; its targets are d[1] to d[n], and a window
that starts at s reads d[s], d[s + 1], ... and predicts d[s + 1], d[s + 2], ... In every protocol
each target is scored exactly once, and no window reaches into another document.

    stream   windows at 0, L, 2L, ... in order, the state of one carried into the next
    windows  the same windows, each from the initial state
    sliding  windows at 0, S, 2S, ..., each from the initial state; the first scores all of its L
             targets, the others their last S, the last one what is left. S = L is "windows".
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from memjax.config import FieldError
from memjax.data import Corpus
from memjax.evals.config import Eval

LOSSLESS = ("bytes", "bpe")
"""Kinds of tokenizers whose decoding gives the text back."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """How documents are cut: see the module. stride is None but for "sliding"."""

    name: str
    context: int
    stride: int | None
    carry: bool


class Span(NamedTuple):
    """The first `targets` targets of a document; `whole` if these are all."""

    document: int
    targets: int
    whole: bool


class Window(NamedTuple):
    """Inputs d[start : start + length]; the targets of the first `skip` are not scored.

    fresh: the state is the initial one before it.
    """

    document: int
    start: int
    length: int
    skip: int
    fresh: bool


class Batch(NamedTuple):
    """A window a lane, padded to the context; a lane without a window is None."""

    windows: list[Window | None]
    tokens_BT: np.ndarray
    targets_BT: np.ndarray
    reset_BT: np.ndarray


def resolve(config: Eval, sequence: int) -> Protocol:
    """The protocol of a config; context None is `sequence`, stride None half the context."""
    context = sequence if config.context is None else config.context
    if config.protocol != "sliding":
        carry = config.carry and config.protocol == "stream"
        return Protocol(name=config.protocol, context=context, stride=None, carry=carry)
    stride = max(1, context // 2) if config.stride is None else config.stride
    if stride > context:
        raise FieldError("stride", stride, f"must be at most context={context}", "config.eval.")
    return Protocol(name="sliding", context=context, stride=stride, carry=False)


def take(
    corpus: Corpus, context: int, max_tokens: int | None = None, max_documents: int | None = None
) -> list[Span]:
    """The part of a corpus that is scored, from its start on.

    max_tokens: the document that would pass it is cut to whole segments of `context`, and to whole
        characters; at least one segment is scored.
    """
    lengths = (np.diff(corpus.starts) - 1)[:max_documents]
    spans: list[Span] = []
    left = int(lengths.sum()) if max_tokens is None else max_tokens
    for document, targets in enumerate(map(int, lengths)):
        if targets <= left:
            spans.append(Span(document, targets, True))
            left -= targets
            continue
        segments = left // context if spans else max(1, left // context)
        cut = min(segments * context, targets)
        if cut and cut < targets:
            cut = _whole_characters(corpus, document, cut)
        if cut:
            spans.append(Span(document, cut, cut == targets))
        break
    return spans


def text_of(corpus: Corpus, document: int, targets: int) -> str:
    """The text of the first targets of a document."""
    first = int(corpus.starts[document]) + 1
    return corpus.tokenizer.decode(corpus.tokens[first : first + targets])


def _whole_characters(corpus: Corpus, document: int, cut: int) -> int:
    """The largest cut, up to this one, that does not split a character."""
    if corpus.tokenizer.kind in LOSSLESS:
        low = max(0, cut - 16)  # decoding may begin anywhere: only the end matters
        first = int(corpus.starts[document]) + 1
        while cut > low + 1:
            tail = corpus.tokenizer.decode(corpus.tokens[first + low : first + cut])
            if not tail.endswith("\ufffd"):
                break
            cut -= 1
    return cut


def windows(protocol: Protocol, span: Span) -> Iterator[Window]:
    """The windows of one document, in order."""
    step = protocol.context if protocol.stride is None else protocol.stride
    start = covered = 0
    while covered < span.targets:
        length = min(protocol.context, span.targets - start)
        fresh = not protocol.carry or start == 0
        yield Window(span.document, start, length, covered - start, fresh)
        covered = start + length
        start += step


def chains(protocol: Protocol, spans: Iterable[Span]) -> Iterator[Iterator[Window]]:
    """Windows that one lane must read in order: a document if state is carried, else one window.

    The longest documents come first, so that lanes end at about the same time.
    """
    for span in sorted(spans, key=lambda s: -s.targets):
        if protocol.carry:
            yield windows(protocol, span)
        else:
            yield from (iter((window,)) for window in windows(protocol, span))


def rounds(chains: Iterator[Iterator[Window]], lanes: int) -> Iterator[list[Window | None]]:
    """A window for each lane at a time; a lane whose chain ends takes the next one."""
    current: list[Iterator[Window]] = [iter(()) for _ in range(lanes)]

    def following(lane: int) -> Window | None:
        while True:
            window = next(current[lane], None)
            if window is not None:
                return window
            chain = next(chains, None)
            if chain is None:
                return None
            current[lane] = chain

    while any(row := [following(lane) for lane in range(lanes)]):
        yield row


def assemble(
    row: list[Window | None], width: int, read: Callable[[int, int, int], np.ndarray]
) -> Batch:
    """The arrays of a row of windows; `read(document, start, stop)` gives tokens.

    Padding is token 0 and comes after the window, where no scored token sees it; a window that is
    padded is the last of its chain, so the next one in the lane is fresh.
    """
    tokens_BT = np.zeros((len(row), width), np.int32)
    targets_BT = np.zeros((len(row), width), np.int32)
    reset_BT = np.zeros((len(row), width), bool)
    for lane, window in enumerate(row):
        if window is None:
            continue
        ids = read(window.document, window.start, window.start + window.length + 1)
        tokens_BT[lane, : window.length] = ids[:-1]
        targets_BT[lane, : window.length] = ids[1:]
        reset_BT[lane, 0] = window.fresh
    return Batch(row, tokens_BT, targets_BT, reset_BT)
