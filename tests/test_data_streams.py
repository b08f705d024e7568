"""Streams: every target once an epoch, rows that continue, and steps that need no history."""

import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from memjax.config import ConfigError
from memjax.data import Corpus, Data, DataError
from memjax.data.streams import batches, epoch_order, iterate
from memjax.data.tokenizers import Bytes

BOS = Bytes.bos_id
# Documents shorter than, equal to, one more than and several times a window of 8.
LENGTHS = (3, 8, 9, 1, 40, 16, 25, 7, 64, 2, 30)
GOLDEN = [5, 0, 6, 3, 4, 1, 2, 7]  # epoch_order(3, 5, 8): resumed runs rely on it


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    """Every token of the corpus but bos is unique, so that a target tells its place."""
    tokens, value = [], 1000
    for length in LENGTHS:
        tokens += [BOS, *range(value, value + length)]
        value += length
    np.array(tokens, np.uint16).tofile(tmp_path / "tokens.bin")
    counts = np.array(LENGTHS, np.int64)
    return Corpus(
        folder=tmp_path,
        source="text",
        split="train",
        tokenizer=Bytes(),
        dtype="uint16",
        starts=np.concatenate([[0], np.cumsum(counts + 1)]),
        names=[str(length) for length in LENGTHS],
        words=counts,
        bytes=counts,
        digest="",
    )


def make(stream: str, batch: int = 3, sequence: int = 8, seed: int = 0) -> Data:
    return Data(stream=stream, batch=batch, sequence=sequence, seed=seed)


def windows(stream: str, length: int) -> int:
    """Windows of an epoch, counted from LENGTHS alone."""
    if stream == "documents":
        return sum(-(-size // length) for size in LENGTHS)
    return -(-(sum(LENGTHS) + len(LENGTHS) - 1) // length)


def targets(rows: list[dict]) -> Counter:
    return Counter(int(t) for b in rows for t in b["targets_BT"][b["weight_BT"] > 0])


ALL = set(range(1000, 1000 + sum(LENGTHS)))


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
@pytest.mark.parametrize("segments", [1, 2])
def test_an_epoch_of_documents_has_every_target_exactly_once(corpus, batch, segments):
    stream = batches(make("documents", batch, 4), corpus, segments=segments)
    steps = -(-windows("documents", 4 * segments) // batch)
    for epoch in range(3):
        seen = targets([stream[epoch * steps + step] for step in range(steps)])
        assert set(seen) == ALL
        assert set(seen.values()) == {1}


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_an_epoch_of_packed_windows_has_every_target_exactly_once(corpus, batch):
    stream, count = batches(make("packed", batch), corpus), windows("packed", 8)
    rows = [
        {name: array[row : row + 1] for name, array in stream[step].items()}
        for step in range(3 * count)
        for row in range(batch)
    ]
    for epoch in range(3):
        seen = targets(rows[epoch * count : (epoch + 1) * count])
        assert set(seen) == ALL
        assert set(seen.values()) == {1}


@pytest.mark.parametrize("stream", ["packed", "documents"])
def test_a_target_is_the_token_after_its_input_in_the_same_document(corpus, stream):
    after = dict(zip(corpus.tokens[:-1].tolist(), corpus.tokens[1:].tolist()))
    first_of = {int(corpus.tokens[start + 1]) for start in corpus.starts[:-1]}
    dataset, padding = batches(make(stream), corpus), 0
    for step in range(30):
        b = dataset[step]
        real = b["weight_BT"] > 0
        assert set(np.unique(b["weight_BT"])) <= {0.0, 1.0}
        padding += (~real).sum()
        assert BOS not in b["targets_BT"][real]
        assert (b["targets_BT"][~real] == BOS).all()
        for token, target in zip(b["tokens_BT"][real].tolist(), b["targets_BT"][real].tolist()):
            assert target in first_of if token == BOS else after[token] == target
    assert padding > 0


@pytest.mark.parametrize("segments", [1, 2])
def test_rows_of_documents_continue_from_step_to_step(corpus, segments):
    stream = batches(make("documents", 3, 4), corpus, segments=segments)
    steps = -(-windows("documents", 4 * segments) // 3)
    ends = {int(corpus.tokens[end - 1]) for end in corpus.starts[1:]}
    continued = 0
    for step in range(1, 4 * steps):
        before, now = stream[step - 1], stream[step]
        for row in range(3):
            real = before["weight_BT"][row] > 0
            if step % steps == 0 or not now["weight_BT"][row].any():
                continue
            last = int(before["targets_BT"][row][real][-1])
            if last in ends:
                assert now["reset_BT"][row, 0]
                assert now["tokens_BT"][row, 0] == BOS
            else:
                continued += 1
                assert real.all()
                assert not now["reset_BT"][row, 0]
                assert now["tokens_BT"][row, 0] == last
    assert continued > 20


@pytest.mark.parametrize("stream", ["packed", "documents"])
def test_state_starts_anew_at_documents_and_lane_starts_and_nowhere_else(corpus, stream):
    dataset = batches(make(stream, 4), corpus)
    steps = -(-windows(stream, 8) // 4)
    for step in range(3 * steps):
        b = dataset[step]
        for row in range(4):
            used = b["weight_BT"][row].nonzero()[0]
            size = used[-1] + 1 if len(used) else 0
            expected = b["tokens_BT"][row] == BOS
            if stream == "packed" or step % steps == 0:
                expected[0] = True
            np.testing.assert_array_equal(b["reset_BT"][row, :size], expected[:size])
            assert not b["reset_BT"][row, size:].any()


def test_padding_does_not_reset(corpus):
    dataset = batches(make("documents", 3), corpus)
    for step in range(30):
        b = dataset[step]
        padded = b["weight_BT"] == 0
        assert not b["reset_BT"][padded].any()


def test_a_line_end_that_opens_documents_is_still_a_target(corpus, tmp_path):
    """With words, <eos> opens a document and is also predicted: weights follow places, not ids."""
    np.full(corpus.starts[-1], BOS, np.uint16).tofile(tmp_path / "tokens.bin")
    for stream in ("packed", "documents"):
        config, count = make(stream, 1), windows(stream, 8)
        dataset = batches(config, corpus)
        weights = sum(dataset[step]["weight_BT"].sum() for step in range(count))
        assert weights == corpus.number_of_targets == sum(LENGTHS)


@pytest.mark.parametrize("stream", ["packed", "documents"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_rows_of_all_processes_are_the_rows_of_one(corpus, stream, count):
    whole = batches(make(stream, 4), corpus)
    shards = [batches(make(stream, 4), corpus, process=(index, count)) for index in range(count)]
    for step in (0, 1, 7, 12, 1000):
        for name, array in whole[step].items():
            parts = [shard[step][name] for shard in shards]
            np.testing.assert_array_equal(np.concatenate(parts), array)


@pytest.mark.parametrize("stream", ["packed", "documents"])
@pytest.mark.parametrize("threads", [0, 3])
def test_a_seek_equals_reading_from_the_start(corpus, stream, threads):
    dataset = batches(make(stream), corpus)
    start = 37
    read = list(islice(iterate(dataset, 0, threads), start + 15))
    seek = iterate(batches(make(stream), corpus), start, threads)
    for step, b in zip(range(start, start + 15), seek):
        for name, array in b.items():
            np.testing.assert_array_equal(array, read[step][name])
            np.testing.assert_array_equal(array, dataset[step][name])


@pytest.mark.parametrize("stream", ["packed", "documents"])
def test_types_and_shapes_are_those_of_the_contract(corpus, stream):
    b = batches(make(stream, 3, 4), corpus, segments=2)[0]
    assert {name: (array.dtype.name, array.shape) for name, array in b.items()} == {
        "tokens_BT": ("int32", (3, 8)),
        "targets_BT": ("int32", (3, 8)),
        "weight_BT": ("float32", (3, 8)),
        "reset_BT": ("bool", (3, 8)),
    }


@pytest.mark.parametrize("stream", ["packed", "documents"])
def test_seed_and_epoch_change_the_order_and_threads_do_not(corpus, stream):
    def first(config: Data, step: int = 0) -> list[int]:
        return batches(config, corpus)[step]["targets_BT"].ravel().tolist()

    config = make(stream)
    steps = -(-windows(stream, 8) // 3)
    assert first(config) == first(replace(config, threads=7))
    assert first(config) != first(replace(config, seed=1))
    assert first(config) != first(config, steps)


def test_the_order_is_a_permutation_that_no_version_changes():
    for size in (1, 2, 97):
        assert sorted(epoch_order(3, 5, size)) == list(range(size))
    assert epoch_order(3, 5, 8).tolist() == GOLDEN
    assert epoch_order(5, 3, 8).tolist() != GOLDEN


def test_the_contract_of_rows_over_processes_is_checked(corpus):
    with pytest.raises(ConfigError, match="batch=6 must be a multiple of the 4 processes; try 8"):
        batches(make("packed", 6), corpus, process=(0, 4))
    with pytest.raises(ValueError, match="segments=0"):
        batches(make("packed"), corpus, segments=0)


@pytest.mark.parametrize(
    ("stream", "sequence", "message"),
    [
        ("packed", 128, "which has 2 such windows; set data.sequence to at most 51 or .*batch to"),
        ("packed", 4000, "4 rows of 4000 tokens do not fit split 'train' of text"),
        ("documents", 64, None),
    ],
)
def test_a_corpus_smaller_than_a_batch_is_one_line(corpus, stream, sequence, message):
    config = make(stream, 4, sequence)
    if message is None:
        assert batches(config, corpus)[0]["weight_BT"].any()
        config = make(stream, 12, sequence)
        message = "11 such windows; .*set data.batch to at most 11"
    with pytest.raises(DataError, match=message) as caught:
        batches(config, corpus)
    assert "\n" not in str(caught.value)


def test_closing_an_iterator_stops_its_threads(corpus):
    def running() -> int:
        return sum(thread.name.startswith("grain-prefetch") for thread in threading.enumerate())

    before = running()
    reader = iterate(batches(make("packed"), corpus), 0, 2)
    next(reader)
    assert running() > before
    reader.close()
    for thread in threading.enumerate():
        if thread.name.startswith("grain-prefetch"):
            thread.join(5)
    assert running() == before


def test_an_iterator_left_open_at_exit_prints_nothing(tmp_path):
    code = """
import sys
from memjax.data import Data, open_corpus
from memjax.data.streams import batches, iterate
config = Data(source="text", path=sys.argv[1], cache=sys.argv[2], sequence=8, batch=2)
reader = iterate(batches(config, open_corpus(config, "train")), 5, 2)
next(reader)
"""
    (tmp_path / "a.txt").write_text("some line of text\n" * 50)
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", code, str(tmp_path / "a.txt"), str(tmp_path / "cache")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stdout == ""
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["tokenising text train"]
