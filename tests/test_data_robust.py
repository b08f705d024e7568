"""Data survives odd file names, builds that were killed, other scripts and other processes."""

import os
import pickle
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from memjax.config import ConfigError
from memjax.data import Data, DataError, cache, load_tokenizer, open_corpus
from memjax.data.streams import batches
from memjax.data.text import space_blocks
from memjax.data.tokenizers import Bpe


def text_folder(tmp_path: Path, **fields) -> Data:
    (tmp_path / "data").mkdir()
    for i in range(6):
        (tmp_path / "data" / f"{i}.txt").write_text(f"document {i}\n" * 40)
    path, store = str(tmp_path / "data"), str(tmp_path / "cache")
    return Data(source="text", path=path, cache=store, **fields)


@pytest.mark.parametrize("stream", ["packed", "documents"])
def test_a_pickled_stream_gives_the_same_batches(stream, tmp_path):
    config = text_folder(tmp_path, stream=stream, sequence=16, batch=2)
    dataset = batches(config, open_corpus(config, "train"))
    dataset[3]
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 10_000
    for name, array in pickle.loads(pickled)[5].items():
        np.testing.assert_array_equal(array, dataset[5][name])


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse names not in UTF-8")
def test_a_file_name_that_is_not_utf8_is_a_document(tmp_path):
    config = text_folder(tmp_path)
    with open(os.fsencode(tmp_path / "data") + b"/caf\xe9.txt", "wb") as file:
        file.write(b"text\n")
    corpus = open_corpus(config, "all")
    assert "caf\udce9.txt" in corpus.names
    assert open_corpus(config, "all").digest == corpus.digest


def test_what_a_killed_vocabulary_build_left_is_removed_when_stale(tmp_path):
    config = text_folder(tmp_path, tokenizer="words")
    folder = tmp_path / "cache" / "tokenizers"
    folder.mkdir(parents=True)
    stale, fresh = folder / f"{cache.PART}stale", folder / f"{cache.PART}fresh"
    stale.write_text("half")
    fresh.write_text("half")
    os.utime(stale, (time.time() - 2 * cache.STALE_S,) * 2)
    load_tokenizer(config)
    assert not stale.exists()
    assert fresh.exists()


def test_a_file_in_the_place_of_a_cache_folder_is_replaced(tmp_path, caplog):
    config = text_folder(tmp_path)
    corpus = open_corpus(config, "train")
    tokens = corpus.tokens.tolist()
    for path in corpus.folder.iterdir():
        path.unlink()
    corpus.folder.rmdir()
    corpus.folder.write_text("a file")
    assert open_corpus(config, "train").tokens.tolist() == tokens
    assert "is damaged" in caplog.records[0].getMessage()
    assert list(corpus.folder.parent.iterdir()) == [corpus.folder]


def test_another_process_that_replaces_a_damaged_folder_first_is_no_error(tmp_path, monkeypatch):
    config = text_folder(tmp_path)
    corpus = open_corpus(config, "train")
    (corpus.folder / "tokens.bin").write_bytes(b"")
    rename = os.rename

    def rename_second(source, target):
        if Path(source) == corpus.folder:  # the other process took it away meanwhile
            rename(source, tmp_path / "taken")
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename_second)
    opened = open_corpus(config, "train")
    assert (tmp_path / "taken").exists()
    assert len(opened.tokens) == opened.starts[-1]


@pytest.mark.parametrize(
    "text", ["我们去，\n\u3000\u3000他说。\n", "“是”\n", "слово\n", "ок \u2028\n"]
)
def test_blocks_of_other_scripts_give_the_ids_of_the_whole(text, monkeypatch):
    raw = (text * 200).encode()
    bpe = Bpe.train([raw], 300)
    whole = bpe.encode(raw)
    blocks = list(space_blocks(raw, 64))
    assert b"".join(blocks) == raw
    assert max(map(len, blocks)) < 256
    monkeypatch.setattr(Bpe, "_BLOCK", 64)
    np.testing.assert_array_equal(bpe.encode(raw), whole)
    assert bpe.decode(whole).encode() == raw


@pytest.mark.parametrize("segments", [1, 4])
def test_the_smaller_sequence_an_error_names_is_accepted(segments, tmp_path):
    config = text_folder(tmp_path, sequence=4000, batch=4)
    corpus = open_corpus(config, "train")
    with pytest.raises(DataError) as caught:
        batches(config, corpus, segments=segments)
    named = int(str(caught.value).split("data.sequence to at most ")[1].split()[0])
    smaller = Data(source="text", path=config.path, cache=config.cache, sequence=named, batch=4)
    assert batches(smaller, corpus, segments=segments)[0]["weight_BT"].any(axis=1).all()


def test_a_mistake_in_the_data_is_a_mistake_in_the_config():
    assert issubclass(DataError, ConfigError)
