"""The token cache is complete, correct or absent, whatever happens to a build."""

import errno
import json
import multiprocessing
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest

from memjax.data import (
    Data,
    DataError,
    cache,
    count_words,
    describe,
    load_tokenizer,
    open_corpus,
)
from memjax.data.cache import token_dtype
from memjax.data.tokenizers import Bytes, Tokenizer, Words

BOOKS = {
    "train/a.txt": b"one two\r\nthree\r\n",
    "train/b.txt": "é x".encode(),
    "valid/c.txt": b"\n\n v",
    "test/d.txt": b"t",
}


@pytest.fixture
def config(tmp_path) -> Data:
    for name, text in BOOKS.items():
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    return Data(source="text", path=str(tmp_path / "data"), cache=str(tmp_path / "cache"))


def folders(config: Data) -> list[Path]:
    return sorted((Path(str(config.cache)) / "corpora").iterdir())


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe", "words"])
def test_documents_on_disk_are_bos_then_their_tokens(config, tokenizer):
    config = Data(
        source="text", path=config.path, cache=config.cache, tokenizer=tokenizer, vocab_size=None
    )
    corpus = open_corpus(config, "train")
    used = load_tokenizer(config)
    expected = [np.r_[used.bos_id, used.encode(BOOKS[name])] for name in corpus.names]
    assert corpus.names == ["train/a.txt", "train/b.txt"]
    np.testing.assert_array_equal(corpus.tokens, np.concatenate(expected))
    assert np.diff(corpus.starts).tolist() == [len(ids) for ids in expected]
    assert corpus.words.tolist() == [count_words("text", BOOKS[name]) for name in corpus.names]
    assert corpus.bytes.tolist() == [len(BOOKS[name]) for name in corpus.names]
    assert corpus.number_of_targets == sum(len(ids) - 1 for ids in expected)
    assert corpus.tokens.dtype == token_dtype(used.vocab_size)


def test_a_second_opening_reads_no_text(config, monkeypatch):
    digest = open_corpus(config, "train").digest
    monkeypatch.setattr(cache, "build", None)
    monkeypatch.setattr("memjax.data.documents.Document.read", None)
    assert open_corpus(config, "train").digest == digest


def test_an_edited_file_gives_a_new_corpus(config):
    before = open_corpus(config, "train")
    Path(str(config.path), "train", "b.txt").write_text("other")
    after = open_corpus(config, "train")
    assert after.digest != before.digest
    assert bytes(after.tokens[-5:].astype(np.uint8)) == b"other"


def test_the_digest_depends_on_text_split_and_tokenizer_not_on_place(config, tmp_path):
    corpus = open_corpus(config, "train")
    moved = tmp_path / "elsewhere"
    os.rename(str(config.path), moved)
    os.utime(moved / "train" / "a.txt", (1, 1))
    again = Data(source="text", path=str(moved), cache=str(tmp_path / "other"))
    assert open_corpus(again, "train").digest == corpus.digest
    others = [open_corpus(again, "valid"), open_corpus(again, "all")]
    others.append(open_corpus(again, "train", Words.train(BOOKS.values())))
    assert len({corpus.digest, *(other.digest for other in others)}) == 4


def test_another_models_tokenizer_reads_this_text(config):
    words = Words.train([b"one three\n"])
    corpus = open_corpus(config, "train", words)
    unknown = words.encode(b"new")[0]
    one, three, end = (int(words.encode(text)[0]) for text in (b"one", b"three", b"\n"))
    assert corpus.tokens.tolist() == [
        end,
        one,
        unknown,
        end,
        three,
        end,
        end,
        unknown,
        unknown,
        end,
    ]


def test_a_pickled_corpus_is_small_and_opens_again(config):
    Path(str(config.path), "train", "a.txt").write_bytes(b"line\n" * 40_000)
    corpus = open_corpus(config, "train")
    tokens = np.array(corpus.tokens)
    pickled = pickle.dumps(corpus)
    assert len(pickled) < 5000 < len(tokens)
    np.testing.assert_array_equal(pickle.loads(pickled).tokens, tokens)


@pytest.mark.parametrize(
    ("size", "dtype"), [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")]
)
def test_tokens_take_the_smallest_type(size, dtype):
    assert token_dtype(size) == dtype


def test_a_vocabulary_beyond_uint32_is_refused():
    with pytest.raises(DataError, match="4294967297 ids does not fit uint32"):
        token_dtype(2**32 + 1)


class Broken(Bytes):
    vocab_size = 100
    bos_id = 0


def test_ids_outside_the_vocabulary_are_refused_and_leave_nothing(config):
    with pytest.raises(DataError, match="outside its vocabulary of 100"):
        open_corpus(config, "train", Broken())
    assert folders(config) == []


def truncate_tokens(folder: Path) -> None:
    (folder / "tokens.bin").write_bytes((folder / "tokens.bin").read_bytes()[:-1])


def flip_token(folder: Path) -> None:
    raw = bytearray((folder / "tokens.bin").read_bytes())
    raw[4] ^= 1
    (folder / "tokens.bin").write_bytes(raw)


def edit_documents(folder: Path) -> None:
    path = folder / "documents.json"
    path.write_text(path.read_text().replace('"tokens": [17', '"tokens": [16'))


def edit_header(folder: Path) -> None:
    path = folder / "header.json"
    path.write_text(path.read_text().replace('"documents": 2', '"documents": 3'))


DAMAGE = {
    "truncated tokens": (truncate_tokens, "tokens.bin has 43 bytes, not 44"),
    "flipped token": (flip_token, "tokens.bin does not match its checksum"),
    "missing tokens": (lambda f: (f / "tokens.bin").unlink(), "tokens.bin cannot be read"),
    "edited documents": (edit_documents, "documents.json does not match its checksum"),
    "edited header": (edit_header, "header.json does not match its checksum"),
    "empty header": (lambda f: (f / "header.json").write_text(""), "header.json is broken"),
    "other header": (lambda f: (f / "header.json").write_text("[]"), "header.json is broken"),
    "missing header": (lambda f: (f / "header.json").unlink(), "header.json cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_reported_and_rebuilt(damage, config, caplog):
    harm, message = DAMAGE[damage]
    good = np.array(open_corpus(config, "train").tokens)
    (folder,) = folders(config)
    harm(folder)
    corpus = open_corpus(config, "train")
    np.testing.assert_array_equal(corpus.tokens, good)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert f"cache {folder} is damaged: {message}" in record.getMessage()
    assert "\n" not in record.getMessage()
    assert folders(config) == [folder]


def test_a_cache_that_stays_damaged_is_an_error(config, monkeypatch):
    def broken(*_, **__):
        raise cache.Damaged("tokens.bin has 0 bytes, not 44")

    monkeypatch.setattr(cache, "read", broken)
    with pytest.raises(DataError, match="damaged again after a rebuild.*set data.cache"):
        open_corpus(config, "train")


def test_a_large_corpus_is_verified_by_describe(config, monkeypatch, caplog):
    monkeypatch.setattr(cache, "CHECK_BELOW", 10)
    open_corpus(config, "train")
    flip_token(folders(config)[0])
    open_corpus(config, "train")
    assert caplog.records == []
    describe(config)
    assert "does not match its checksum" in caplog.records[0].getMessage()


def test_a_damaged_vocabulary_is_reported_and_learned_again(config, caplog):
    config = Data(source="text", path=config.path, cache=config.cache, tokenizer="words")
    digest = load_tokenizer(config).digest
    (path,) = (Path(str(config.cache)) / "tokenizers").iterdir()
    path.write_text(path.read_text()[:-5])
    assert load_tokenizer(config).digest == digest
    assert "is damaged" in caplog.records[0].getMessage()
    assert Tokenizer.load(path).digest == digest


def test_a_vocabulary_is_learned_from_the_training_split_alone(config):
    config = Data(source="text", path=config.path, cache=config.cache, tokenizer="words")
    words = load_tokenizer(config).content()["words"]
    assert words == ["<eos>", "one", "two", "three", "é", "x", "<unk>"]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, r"has no space left \(may need 1 MB\); make room or set data.cache"),
        (errno.EROFS, "cannot be written .*; set data.cache or MEMJAX_CACHE"),
    ],
)
@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_full_disk_is_one_line_and_leaves_nothing(number, message, call, config, monkeypatch):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(DataError, match=message) as caught:
            open_corpus(config, "train")
    assert "\n" not in str(caught.value)
    assert folders(config) == []
    assert open_corpus(config, "train").number_of_targets == 20


def test_a_full_disk_leaves_no_half_vocabulary(config, monkeypatch):
    config = Data(source="text", path=config.path, cache=config.cache, tokenizer="words")

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(DataError, match="cannot be written .No space left"):
            load_tokenizer(config)
    assert list((Path(str(config.cache)) / "tokenizers").iterdir()) == []


def crash(config: Data) -> None:
    cache._write_json = lambda *_: os._exit(9)  # tokens are written, nothing else is
    open_corpus(config, "train")


def start(target, *arguments):
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments)
    process.start()
    return process


def test_a_killed_build_leaves_nothing_that_is_used_and_is_removed_when_stale(config):
    process = start(crash, config)
    process.join(60)
    assert process.exitcode == 9
    (part,) = folders(config)
    assert part.name.startswith(cache.PART)
    assert open_corpus(config, "train").number_of_targets == 20
    assert part in folders(config)
    for path in (*part.iterdir(), part):
        os.utime(path, (time.time() - 2 * cache.STALE_S,) * 2)
    open_corpus(config, "valid")
    assert not part.exists()
    assert len(folders(config)) == 2


def build_with(config: Data, queue) -> None:
    queue.put(open_corpus(config, "train").tokens.tolist())


def test_two_processes_that_build_at_once_both_succeed(config):
    queue = multiprocessing.get_context("spawn").Queue()
    processes = [start(build_with, config, queue) for _ in range(2)]
    results = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert results[0] == results[1] == open_corpus(config, "train").tokens.tolist()
    assert len(folders(config)) == 1


def test_the_loser_of_a_race_keeps_the_winners_folder(config, monkeypatch):
    write, calls = cache._write, []

    def write_after_another(*arguments):
        write(*arguments)
        if not calls:
            calls.append(None)
            open_corpus(config, "train")
            (folders(config)[-1] / "mark").write_text("")

    monkeypatch.setattr(cache, "_write", write_after_another)
    assert open_corpus(config, "train").number_of_targets == 20
    (folder,) = folders(config)
    assert (folder / "mark").exists()


def test_describe_gives_sizes_of_every_split_as_json(config):
    sizes = json.loads(json.dumps(describe(config)))
    assert list(sizes["splits"]) == ["train", "valid", "test"]
    assert sizes["vocabulary"] == 257
    train = sizes["splits"]["train"]
    found = [train[name] for name in ("documents", "tokens", "words", "bytes")]
    assert found == [2, 20, 5, 20]
    assert train["digest"] == open_corpus(config, "train").digest
    assert sizes["splits"]["valid"]["tokens"] == 4
