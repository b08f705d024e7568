"""Synthetic tasks: rows of symbols whose right answers are known, to probe recall and state.

A row is one document of `length` symbols. `targets` are answers, not always the next symbol, and
only positions of weight 1 are trained on and scored. Published pass and fail patterns are in the
docstrings; a pass that theory forbids is more likely a leak than a discovery.
"""

import dataclasses
import functools
import itertools
from abc import abstractmethod
from typing import Annotated, ClassVar, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from memjax.config import FieldError, OneOf, check_at_least


class Rows(NamedTuple):
    """Inputs, answers, and 1 where an answer is asked for."""

    tokens: Int32[np.ndarray, "n T"]
    targets: Int32[np.ndarray, "n T"]
    weight: Float32[np.ndarray, "n T"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Base of the tasks; `kind` is the key in `TASKS`."""

    kind: ClassVar[str]

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Symbols are below it."""

    @property
    def shortest(self) -> int:
        """The least length of a row."""
        return 1

    @abstractmethod
    def row(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, ...]:
        """tokens, targets and weight of one row."""

    def rows(self, seeds: list[np.random.SeedSequence], length: int) -> Rows:
        """A row for each seed. Raises FieldError if the task does not fit the length."""
        if length < self.shortest:
            rule = f"is too short for task {self.kind}; use at least {self.shortest}"
            raise FieldError("sequence", length, rule, "data.")
        drawn = [self.row(np.random.Generator(np.random.PCG64(seed)), length) for seed in seeds]
        tokens, targets, weight = (np.stack(parts) for parts in zip(*drawn))
        kinds = np.int32, np.int32, np.float32
        return Rows(*(a.astype(t) for a, t in zip((tokens, targets, weight), kinds)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MQAR(Task):
    """Multi-query associative recall (arXiv:2312.04927, and its released generator).

    A row opens with `pairs` keys and values, k_1 v_1 k_2 v_2 ...; later every key returns once, and
    the answer there is its value, which the row does not show. Keys are 1 .. vocab/2 - 1, values
    vocab/2 .. vocab - 1, each drawn without replacement. Returns are at even distances g behind
    the pairs, distinct, with probability proportional to (g + 1)^(power - 1).

    writes: values a key is given, in a random order of all pairs; the last one counts.
    filler: what stands between the returns: 0, or uniform symbols, which may imitate keys.

    A state must hold about pairs * log2(vocab / 2) bits: memories pass with few pairs and fail
    with many; attention passes while the pairs are in its reach.
    """

    kind: ClassVar[str] = "mqar"
    pairs: int = 8
    vocab: int = 256
    writes: int = 1
    power: float = 0.01
    random_filler: bool = False

    def __post_init__(self):
        check_at_least(self, 1, "pairs", "writes")
        check_at_least(self, 4, "vocab")
        if self.pairs > self.vocab // 2 - 1 or self.pairs * self.writes > self.vocab // 2:
            most = min(self.vocab // 2 - 1, self.vocab // 2 // self.writes)
            rule = f"needs more symbols than vocab={self.vocab} has; use at most {most}"
            raise FieldError("pairs", self.pairs, rule)

    @property
    def vocab_size(self) -> int:
        return self.vocab

    @property
    def shortest(self) -> int:
        return 2 * self.pairs * (self.writes + 1)

    def row(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, ...]:
        half, count = self.vocab // 2, self.pairs * self.writes
        keys = 1 + rng.permutation(half - 1)[: self.pairs]
        values = half + rng.permutation(half)[:count]
        owner = rng.permutation(np.repeat(np.arange(self.pairs), self.writes))
        last = np.empty(self.pairs, int)
        last[owner] = values  # the later of two writes to one index stays
        tokens = (
            rng.integers(0, self.vocab, length) if self.random_filler else np.zeros(length, int)
        )
        tokens[: 2 * count : 2], tokens[1 : 2 * count : 2] = keys[owner], values
        slots = (length - 2 * count) // 2
        weights = (np.arange(slots) + 1.0) ** (self.power - 1)
        # The largest of log p + Gumbel noise are draws without replacement.
        noisy = np.log(weights) + rng.gumbel(size=slots)
        places = 2 * count + 2 * np.argsort(-noisy)[: self.pairs]
        targets, weight = np.zeros(length, int), np.zeros(length)
        tokens[places], targets[places], weight[places] = keys, last, 1
        return tokens, targets, weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parity(Task):
    """The parity of the bits so far, at every position.

    One bit of state, but linear recurrences whose transitions have eigenvalues in [0, 1], and
    attention, fail beyond the lengths they were trained on; an LSTM, and the delta rule with
    eigenvalues down to -1, pass (arXiv:2411.12537).
    """

    kind: ClassVar[str] = "parity"

    @property
    def vocab_size(self) -> int:
        return 2

    def row(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, ...]:
        bits = rng.integers(0, 2, length)
        return bits, np.cumsum(bits) % 2, np.ones(length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Permutations(Task):
    """The product of the permutations of `size` things so far, at every position.

    With size=5 (S5) this is complete for NC1: no diagonal or fixed-depth parallel recurrence tracks
    it at every length; an LSTM does (arXiv:2404.08819).
    """

    kind: ClassVar[str] = "permutations"
    size: int = 5

    def __post_init__(self):
        check_at_least(self, 2, "size")
        if self.size > 6:
            raise FieldError("size", self.size, "must be at most 6, which has 720 symbols")

    @property
    def vocab_size(self) -> int:
        return len(_group(self.size))

    def row(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, ...]:
        table = _group(self.size)
        drawn = rng.integers(0, len(table), length)
        targets = list(itertools.accumulate(drawn, lambda product, new: table[new, product]))
        return drawn, np.array(targets), np.ones(length)


@functools.lru_cache(4)
def _group(size: int) -> np.ndarray:
    """[a, b]: the permutation b, then a; the identity is 0."""
    elements = list(itertools.permutations(range(size)))
    name = {element: i for i, element in enumerate(elements)}
    return np.array([[name[tuple(a[i] for i in b)] for b in elements] for a in elements])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needle(Task):
    """One key and its value in noise, and the key again in the last position: what was its value?

    Symbol 0 stands before the key and its value, and before the key that asks; noise is drawn from
    `noise` symbols of their own. The needle lies anywhere before the question.
    """

    kind: ClassVar[str] = "needle"
    keys: int = 32
    values: int = 32
    noise: int = 64

    def __post_init__(self):
        check_at_least(self, 1, "keys", "values", "noise")

    @property
    def vocab_size(self) -> int:
        return 1 + self.keys + self.values + self.noise

    @property
    def shortest(self) -> int:
        return 5

    def row(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, ...]:
        key = 1 + rng.integers(self.keys)
        value = 1 + self.keys + rng.integers(self.values)
        tokens = 1 + self.keys + self.values + rng.integers(0, self.noise, length)
        place = rng.integers(0, length - 4)
        tokens[place : place + 3], tokens[-2:] = (0, key, value), (0, key)
        targets, weight = np.zeros(length, int), np.zeros(length)
        targets[-1], weight[-1] = value, 1
        return tokens, targets, weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copy(Task):
    """A random string of `alphabet` symbols, a separator (0), and the string again.

    A finite state copies only as many symbols as it can hold (arXiv:2402.01032).
    """

    kind: ClassVar[str] = "copy"
    alphabet: int = 26

    def __post_init__(self):
        check_at_least(self, 2, "alphabet")

    @property
    def vocab_size(self) -> int:
        return self.alphabet + 1

    @property
    def shortest(self) -> int:
        return 2

    def row(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, ...]:
        size = length // 2
        text = 1 + rng.integers(0, self.alphabet, size)
        tokens, targets, weight = (np.zeros(length, int) for _ in range(3))
        tokens[:size], tokens[size + 1 : 2 * size] = text, text[:-1]
        targets[size : 2 * size], weight[size : 2 * size] = text, 1
        return tokens, targets, weight


TASKS: dict[str, type[Task]] = {
    "mqar": MQAR,
    "parity": Parity,
    "permutations": Permutations,
    "needle": Needle,
    "copy": Copy,
}

TaskField = Annotated[Task, OneOf(lambda: TASKS)]
