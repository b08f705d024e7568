"""Streams of batches: step -> batch, a pure function of (config, corpus, step, process).

Element `step` of `batches` is a dict of arrays for the rows of this process, T = sequence *
segments tokens a row:

    tokens_BT   int32    inputs
    targets_BT  int32    the token after each input
    weight_BT   float32  1 for a real target; 0 for padding and where the next document begins
    reset_BT    bool     the state starts anew before this token: the first of a document, or the
                         first of a row that does not continue the row of the step before

"packed": the corpus is cut into windows of T targets (the last one padded), each epoch visits them
in a fresh complete order, and a step takes the next `batch` of them; every window starts anew.

"documents": a window is T targets of one document, counted from its start; the last one of a
document is padded. Each epoch puts the documents in a fresh order, cuts the row of all their
windows into `batch` lanes that differ by at most one window, and row r reads lane r: it continues
row r of the step before. A lane may begin inside a document, whose state then starts anew there
(at most batch - 1 documents an epoch); a lane that is one window short ends with one of weight 0.

In both, an epoch holds every target of the corpus exactly once, with weight 1. Processes own equal
runs of rows: those of all processes, one after another, are the rows of a single one.

A task (`memjax.data.generated`) has neither windows nor epochs: every row is a fresh document.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import lru_cache

import grain
import numpy as np
from jaxtyping import Int

from memjax.config import FieldError
from memjax.data.config import Data
from memjax.data.corpus import Corpus
from memjax.data.errors import DataError
from memjax.data.generated import TaskCorpus, rows_of

STEPS = 2**42  # length of a stream without end

Batch = dict[str, np.ndarray]


def batches(
    config: Data,
    corpus: Corpus | TaskCorpus,
    *,
    segments: int = 1,
    process: tuple[int, int] = (0, 1),
) -> grain.MapDataset:
    """The stream of `config` over `corpus`: a dataset whose element `step` is a batch.

    segments  segments a row, each of config.sequence tokens.
    process   (index, count) of this process; `config.batch` is divided among them.
    Raises ConfigError if the rows cannot be divided, DataError if the corpus is too small.
    """
    index, count = process
    if segments < 1 or not 0 <= index < count:
        raise ValueError(f"segments={segments} and process={process} must be counts from 1")
    if config.batch % count:
        rule = f"must be a multiple of the {count} processes"
        more = -(-config.batch // count) * count
        raise FieldError("batch", config.batch, f"{rule}; try {more}", "data.")
    share = config.batch // count
    rows = np.arange(index * share, (index + 1) * share)
    if isinstance(corpus, TaskCorpus):
        return rows_of(config, corpus, config.sequence * segments, rows)
    stream = STREAMS[config.stream](config, corpus, config.sequence * segments, rows)
    return grain.MapDataset.range(STEPS).map(stream.batch)


def iterate(stream: grain.MapDataset, start: int = 0, threads: int = 0) -> Iterator[Batch]:
    """Elements start, start + 1, ... of `stream`, read ahead by `threads` threads.

    Closing the generator, or leaving it to the garbage collector, stops the threads.
    """
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    reader = iter(stream.to_iter_dataset(options))
    try:
        reader.set_state({"next_index": start})
        yield from reader
    finally:
        reader.close()


def epoch_order(seed: int, epoch: int, size: int) -> Int[np.ndarray, "size"]:
    """A permutation of range(size) for each (seed, epoch), the same in every version of NumPy."""
    raw = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(size)
    return np.argsort(raw, kind="stable")


class Stream(ABC):
    """Windows of a corpus, assigned to (row, step).

    windows    windows an epoch, of `length` targets.
    rows       rows of this process.
    row_count  rows of all processes.
    """

    def __init__(self, config: Data, corpus: Corpus, length: int, rows: np.ndarray):
        self.config, self.corpus, self.length, self.rows = config, corpus, length, rows
        self.seed, self.row_count = config.seed, config.batch
        self.windows = self._count_windows()
        if self.windows < config.batch:
            raise DataError(_too_small(config, corpus, length, self.windows))

    def __reduce__(self):
        # Caches and memory maps stay behind.
        return type(self), (self.config, self.corpus, self.length, self.rows)

    @abstractmethod
    def _count_windows(self) -> int:
        """Windows in an epoch."""

    @abstractmethod
    def batch(self, step: int) -> Batch:
        """The rows of this process at `step`."""

    def _empty(self) -> Batch:
        shape, bos = (len(self.rows), self.length), self.corpus.tokenizer.bos_id
        return {
            "tokens_BT": np.full(shape, bos, np.int32),
            "targets_BT": np.full(shape, bos, np.int32),
            "weight_BT": np.zeros(shape, np.float32),
            "reset_BT": np.zeros(shape, np.bool_),
        }

    def _fill(self, batch: Batch, row: int, start: int, stop: int) -> None:
        """Give `row` the inputs [start, stop) of the corpus; stop + 1 tokens must exist."""
        text = np.asarray(self.corpus.tokens[start : stop + 1], np.int32)
        size = stop - start
        batch["tokens_BT"][row, :size] = text[:-1]
        batch["targets_BT"][row, :size] = text[1:]
        batch["weight_BT"][row, :size] = 1
        first, last = np.searchsorted(self.corpus.starts, [start, stop + 1])
        for begin in self.corpus.starts[first:last] - start:  # documents that begin in the text
            if begin < size:
                batch["reset_BT"][row, begin] = True
            if begin > 0:
                batch["weight_BT"][row, begin - 1] = 0


def _too_small(config: Data, corpus: Corpus, length: int, windows: int) -> str:
    fits = corpus.number_of_targets // config.batch * config.sequence // length
    smaller = f"set data.sequence to at most {fits} or " if 0 < fits < config.sequence else ""
    return (
        f"data.batch={config.batch} rows of {length} tokens do not fit split '{corpus.split}' of "
        f"{corpus.source}, which has {windows} such windows; {smaller}set data.batch to at most "
        f"{windows}"
    )


class Packed(Stream):
    """Shuffled windows of the concatenated documents."""

    def __init__(self, config: Data, corpus: Corpus, length: int, rows: np.ndarray):
        super().__init__(config, corpus, length, rows)
        # Threads read two epochs at once where a step straddles them.
        self._order = lru_cache(2)(lambda epoch: epoch_order(self.seed, epoch, self.windows))

    def _count_windows(self) -> int:
        return -(-(int(self.corpus.starts[-1]) - 1) // self.length)

    def batch(self, step: int) -> Batch:
        batch, last = self._empty(), int(self.corpus.starts[-1]) - 1
        for row, place in enumerate(int(step) * self.row_count + self.rows):
            epoch, position = divmod(int(place), self.windows)
            start = int(self._order(epoch)[position]) * self.length
            self._fill(batch, row, start, min(start + self.length, last))
            batch["reset_BT"][row, 0] = True
        return batch


class Documents(Stream):
    """Lanes: row r continues row r of the step before."""

    def __init__(self, config: Data, corpus: Corpus, length: int, rows: np.ndarray):
        super().__init__(config, corpus, length, rows)
        self.steps = -(-self.windows // self.row_count)
        self._epoch = lru_cache(2)(self._arrange)

    def _per_document(self) -> np.ndarray:
        return -(-(np.diff(self.corpus.starts) - 1) // self.length)

    def _count_windows(self) -> int:
        return int(self._per_document().sum())

    def _arrange(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents in the order of `epoch`, and the window at which each begins."""
        order = epoch_order(self.seed, epoch, len(self.corpus.starts) - 1)
        return order, np.concatenate([[0], np.cumsum(self._per_document()[order])])

    def batch(self, step: int) -> Batch:
        batch = self._empty()
        epoch, step_in_epoch = divmod(int(step), self.steps)
        order, begins = self._epoch(epoch)
        for row, lane in enumerate(self.rows):
            window = int(lane) * self.windows // self.row_count + step_in_epoch
            if window >= (int(lane) + 1) * self.windows // self.row_count:
                continue
            place = int(np.searchsorted(begins, window, "right")) - 1
            document, offset = order[place], (window - int(begins[place])) * self.length
            start = int(self.corpus.starts[document]) + offset
            last = int(self.corpus.starts[document + 1]) - 1
            self._fill(batch, row, start, min(start + self.length, last))
            if step_in_epoch == 0:
                batch["reset_BT"][row, 0] = True
        return batch


STREAMS: Mapping[str, type[Stream]] = {"packed": Packed, "documents": Documents}
