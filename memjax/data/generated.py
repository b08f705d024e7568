"""Rows of a synthetic task as a stream: a row is a pure function of (seed, split, step, row)."""

import dataclasses
import hashlib
import json

import grain
import numpy as np

from memjax.config import to_dict
from memjax.data.config import Data
from memjax.data.documents import split_name
from memjax.data.errors import DataError
from memjax.data.tasks import Task
from memjax.data.tokenizers import Symbols

SPLITS = {"train": 0, "valid": 1, "test": 2}
GENERATOR = 1  # raise it when a task draws other rows from the same seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskCorpus:
    """A split of a task: endless rows, of seeds that no other split has."""

    task: Task
    split: str
    seed: int

    @property
    def source(self) -> str:
        return self.task.kind

    @property
    def tokenizer(self) -> Symbols:
        return Symbols(self.task.vocab_size)

    @property
    def digest(self) -> str:
        identity = [GENERATOR, to_dict(self.task), self.split, self.seed]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def batch(self, first: int, rows: np.ndarray, length: int) -> dict[str, np.ndarray]:
        """The rows `first + rows` of the split."""
        key = (self.seed, SPLITS[self.split])
        seeds = [np.random.SeedSequence((*key, first + int(row))) for row in rows]
        tokens, targets, weight = self.task.rows(seeds, length)
        reset = np.zeros(tokens.shape, np.bool_)
        reset[:, 0] = True
        names = ("tokens_BT", "targets_BT", "weight_BT", "reset_BT")
        return dict(zip(names, (tokens, targets, weight, reset)))


def open_task(config: Data, split: str) -> TaskCorpus:
    """A split of the task of `config`. Raises DataError for an unknown split."""
    assert config.task is not None
    name = split_name(split)
    if name not in SPLITS:
        raise DataError(f"split={split} is not one of a task; use {', '.join(SPLITS)}")
    return TaskCorpus(task=config.task, split=name, seed=config.seed)


def rows_of(config: Data, corpus: TaskCorpus, length: int, rows: np.ndarray) -> grain.MapDataset:
    """Element `step` is the batch of that step, of these rows of the `config.batch` a step has."""
    corpus.batch(0, rows[:1], length)  # a task that does not fit the length fails now
    return grain.MapDataset.range(2**42).map(_Step(corpus, config.batch, length, rows))


@dataclasses.dataclass(frozen=True)
class _Step:
    corpus: TaskCorpus
    row_count: int
    length: int
    rows: np.ndarray

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        return self.corpus.batch(int(step) * self.row_count, self.rows, self.length)
