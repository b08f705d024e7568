"""Every layout gives the documents it promises; every wrong one is one line with a remedy."""

import os
import random
import re
from pathlib import Path

import pytest

from memjax.config import ConfigError
from memjax.data import Data, DataError, open_corpus
from memjax.data.config import cache_folder
from memjax.data.sources import open_source

SPLITS = ("train", "valid", "test")
PG19 = Path(__file__).parents[1].parent / "shared" / "data" / "pg19"
needs_pg19 = pytest.mark.skipif(not PG19.is_dir(), reason="PG-19 is not at ../shared/data/pg19")


def write(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    return root


def texts(source: str, path: Path, split: str) -> dict[str, bytes]:
    documents = open_source(Data(source=source, path=str(path))).documents(split)
    return {document.name: document.read() for document in documents}


def test_stdlib_splits_are_disjoint_and_leave_out_tests_and_other_packages():
    source = open_source(Data())
    names = [document.name for split in SPLITS for document in source.documents(split)]
    assert sorted(names) == [document.name for document in source.whole]
    assert len(set(names)) == len(names) > 100
    assert "json/decoder.py" in names
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {"site-packages", "test", "tests", "encodings"}
    sizes = [sum(d.stop for d in source.documents(split)) for split in SPLITS]
    assert 4e6 < sum(sizes) < 12e6
    assert sizes[0] > 0.8 * sum(sizes)


def test_the_same_path_gives_the_same_order(tmp_path):
    names = [f"{i % 3}/{i}.txt" for i in range(40)]
    random.Random(0).shuffle(names)
    write(tmp_path, {name: name for name in names})
    first = open_source(Data(source="text", path=str(tmp_path)))
    assert [document.name for document in first.whole] == sorted(names)
    assert first == open_source(Data(source="text", path=str(tmp_path)))


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("lines", [3, 4, 20, 1000])
@pytest.mark.parametrize("last", [True, False])
def test_one_file_is_cut_at_line_ends_and_nothing_is_lost(tmp_path, end, lines, last):
    text = end.join(f"line {i} é" * (i % 5 + 1) for i in range(lines)) + end * last
    path = write(tmp_path, {"book": text}) / "book"
    parts = [texts("text", path, split)["book"] for split in SPLITS]
    assert b"".join(parts) == text.encode()
    assert all(parts)
    assert all(part.endswith(b"\n") for part in parts[:2])
    if lines == 1000:
        assert [round(len(part) / len(text.encode()), 2) for part in parts] == [0.9, 0.05, 0.05]


def test_all_is_one_file_uncut(tmp_path):
    write(tmp_path, {"a.txt": "one line"})
    assert texts("text", tmp_path / "a.txt", "all") == {"a.txt": b"one line"}
    assert texts("text", tmp_path, "all") == {"a.txt": b"one line"}


@pytest.mark.parametrize("count", [3, 4, 5, 60])
def test_files_of_a_folder_fill_three_disjoint_splits(tmp_path, count):
    write(tmp_path, {f"{i}.txt": f"text {i}" for i in range(count)})
    names = [set(texts("text", tmp_path, split)) for split in SPLITS]
    assert all(names)
    assert sum(map(len, names)) == len(set.union(*names)) == count


def test_a_new_file_moves_no_other_to_another_split(tmp_path):
    write(tmp_path, {f"{i}.txt": "x" for i in range(80)})
    before = {split: set(texts("text", tmp_path, split)) for split in SPLITS}
    write(tmp_path, {"new.txt": "x"})
    for split in SPLITS:
        assert set(texts("text", tmp_path, split)) - {"new.txt"} == before[split]


def test_folders_and_files_named_for_splits_are_the_splits(tmp_path):
    folders = write(
        tmp_path / "a", {"train/b.txt": "2", "train/a.txt": "1", "dev/c.md": "3", "notes.txt": "n"}
    )
    assert list(texts("text", folders, "train")) == ["train/a.txt", "train/b.txt"]
    assert texts("text", folders, "validation") == {"dev/c.md": b"3"}
    files = write(tmp_path / "b", {"train.txt": "1", "valid.txt": "2", "test.txt": "3"})
    assert [texts("text", files, split) for split in SPLITS] == [
        {"train.txt": b"1"},
        {"valid.txt": b"2"},
        {"test.txt": b"3"},
    ]
    lone = write(tmp_path / "c", {"test.txt": "3"})
    assert texts("text", lone, "test") == {"test.txt": b"3"}


def test_a_file_called_test_among_others_is_no_split(tmp_path):
    write(tmp_path, {"test.txt": "t", "b.txt": "b", "c.txt": "c"})
    assert set(texts("text", tmp_path, "all")) == {"test.txt", "b.txt", "c.txt"}
    assert sum(len(texts("text", tmp_path, split)) for split in SPLITS) == 3


def test_a_link_to_a_folder_above_ends(tmp_path):
    write(tmp_path, {"sub/a.txt": "a", "b.txt": "b"})
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    assert set(texts("text", tmp_path, "all")) == {"sub/a.txt", "b.txt"}


def test_wikitext_is_one_document_a_split(tmp_path):
    write(tmp_path, {f"wiki.{split}.tokens": f" = {split} = \n" for split in SPLITS})
    assert texts("wikitext", tmp_path, "val") == {"wiki.valid.tokens": b" = valid = \n"}
    raw = write(tmp_path / "raw", {"wiki.test.raw": " = t = \n"})
    assert texts("wikitext", raw, "test") == {"wiki.test.raw": b" = t = \n"}


def test_pg19_books_keep_their_bytes_and_have_titles(tmp_path):
    book = "One\r\nTwo \r\n<DW12>é\r\n".encode()
    write(tmp_path, {"train/12.txt": book, "train/7.txt": book, "validation/9.txt": book})
    write(tmp_path, {"metadata.csv": '12,"A, B\nC",1900,http://x\n'})
    assert texts("pg19", tmp_path, "train") == {"12 A, B C": book, "7": book}
    (tmp_path / "metadata.csv").unlink()
    assert list(texts("pg19", tmp_path, "train")) == ["12", "7"]


@needs_pg19
def test_real_books_are_read_byte_for_byte():
    source = open_source(Data(source="pg19", path=str(PG19)))
    assert [len(source.documents(split)) for split in SPLITS] == [30, 8, 8]
    for document in source.documents("valid"):
        assert document.read() == document.path.read_bytes()
        assert document.name.startswith(f"{document.path.stem} ")


WRONG = {
    "missing path": ("text", "gone", {}, "gone does not exist; check data.path="),
    "empty folder": ("text", ".", {}, "has no text files"),
    "no text files": ("text", ".", {"a.bin": "x"}, r"has no text files .*found a.bin"),
    "empty file": ("text", "a.txt", {"a.txt": ""}, "a.txt is empty; remove it"),
    "empty file in a folder": ("text", ".", {"a.txt": "", "b.txt": "b"}, "a.txt is empty"),
    "NUL": ("text", "a", {"a": b"ab\n\0\n" * 9}, "a is not text: NUL byte at offset 3"),
    "latin-1": (
        "text",
        "a",
        {"a": b"line\n" * 300_000 + b"caf\xe9\n" + b"end\n" * 400_000},
        "a is not UTF-8: byte 0xe9 at offset 1500003; convert it",
    ),
    "cut character": ("text", "a", {"a": b"x\n" * 9 + b"\xe6\x97"}, "0xe6 at offset 18"),
    "two names": (
        "text",
        ".",
        {"train.txt": "1", "val.txt": "2", "valid.txt": "3"},
        "has both val.txt and valid.txt for split 'valid'; keep one",
    ),
    "two files": ("text", ".", {"a.txt": "a", "b.txt": "b"}, "no split '.*': 2 text files"),
    "two lines": ("text", "a", {"a": "1\n2\n"}, "no split 'test': .*split=all"),
    "no such split": (
        "text",
        ".",
        {"train.txt": "1"},
        "no split 'valid': .*named for the splits.*add it",
    ),
    "wikitext file": ("wikitext", "a", {"a": "x"}, r"a is a file; data.source=wikitext needs a"),
    "wikitext missing split": (
        "wikitext",
        ".",
        {"wiki.train.tokens": "x"},
        r"no split 'valid': looked for wiki.\{train,valid,test\}.tokens .*add it",
    ),
    "wikitext layout": (
        "wikitext",
        ".",
        {"wikitext-2/wiki.train.tokens": "x"},
        r"expects wiki.*found wikitext-2/; set data.path to the folder that holds them",
    ),
    "wikitext both": (
        "wikitext",
        ".",
        {"wiki.test.tokens": "x", "wiki.test.raw": "x"},
        "both wiki.test.tokens and wiki.test.raw; keep one",
    ),
    "pg19 file": ("pg19", "a.txt", {"a.txt": "x"}, "a.txt is a file; data.source=pg19 needs a"),
    "pg19 layout": ("pg19", ".", {"1.txt": "x"}, "expects folders train, .*found 1.txt"),
    "pg19 no books": ("pg19", ".", {"train/a.pdf": "x"}, "expects folders train"),
    "pg19 missing split": (
        "pg19",
        ".",
        {"train/1.txt": "x"},
        "no split 'valid': expected .*found books for train only; add the folder",
    ),
    "pg19 two folders": (
        "pg19",
        ".",
        {"train/1.txt": "x", "valid/1.txt": "x", "validation/1.txt": "x"},
        "two folders for split 'valid'; keep one",
    ),
    "pg19 metadata": (
        "pg19",
        ".",
        {"train/1.txt": "x", "metadata.csv": "1,Title,1900,u\nbroken\n"},
        "metadata.csv row 2 is not id,title,year,link; repair",
    ),
    "pg19 metadata bytes": (
        "pg19",
        ".",
        {"train/1.txt": "x", "metadata.csv": b"1,\xff\n"},
        "metadata.csv is not UTF-8 CSV",
    ),
}


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_source_is_one_line_that_names_it(case, tokenizer, tmp_path):
    source, path, files, message = WRONG[case]
    root = write(tmp_path / "data", files or {".keep": ""}) / path
    config = Data(source=source, path=str(root), tokenizer=tokenizer, cache=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=message) as caught:
        for split in SPLITS:
            open_corpus(config, split)
    assert str(tmp_path / "data") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("*/.part-*"))


def test_a_missing_path_setting_is_named():
    with pytest.raises(DataError, match="data.path=None: data.source=pg19 needs a path; set"):
        open_source(Data(source="pg19"))


def test_an_unknown_split_lists_the_splits(tmp_path):
    with pytest.raises(DataError, match="split='tset' must be one of train, valid, test, all"):
        open_corpus(Data(cache=str(tmp_path)), "tset")


@pytest.mark.parametrize("call", ["open", "stat"])
def test_a_file_without_permission_is_named(call, tmp_path, monkeypatch):
    path = write(tmp_path, {"a.txt": "1\n2\n3\n"}) / "a.txt"
    source = open_source(Data(source="text", path=str(path)))

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        if call == "open":
            patch.setattr("builtins.open", refuse)
            with pytest.raises(DataError, match=r"a.txt is not readable \(permission denied\)"):
                source.documents("train")[0].read()
        else:
            patch.setattr(Path, "stat", refuse)
            with pytest.raises(DataError, match="a.txt is not readable"):
                open_source(Data(source="text", path=str(path)))


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path):
    path = write(tmp_path, {"a.txt": "1\n2\n3\n"}) / "a.txt"
    document = open_source(Data(source="text", path=str(path))).documents("all")[0]
    path.write_text("1\n")
    with pytest.raises(DataError, match="a.txt became shorter"):
        document.read()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sequence": 0}, "sequence=0 must be at least 1"),
        ({"batch": -1}, "batch=-1 must be at least 1"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"threads": -1}, "threads=-1 must be at least 0"),
        ({"vocab_size": 512}, "vocab_size=512 must be none with tokenizer=bytes"),
        ({"tokenizer": "bpe", "vocab_size": 257}, "vocab_size=257 must be at least 258"),
        ({"tokenizer": "words", "vocab_size": 2}, "vocab_size=2 must be at least 3"),
        ({"tokenizer": "words", "vocab_size": 2**31 + 1}, "must be at most 2147483648"),
        ({"path": "x"}, "path='x' is not read with source=stdlib; set source=text"),
        ({"source": "text", "path": ""}, "path='' must name a file or folder"),
    ],
)
def test_an_impossible_config_names_field_value_and_rule(fields, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        Data(**fields)
    assert "\n" not in str(caught.value)


def test_the_cache_folder_is_the_setting_then_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMJAX_CACHE", str(tmp_path / "env"))
    assert cache_folder(Data()) == tmp_path / "env"
    assert cache_folder(Data(cache=str(tmp_path / "own"))) == tmp_path / "own"
    monkeypatch.delenv("MEMJAX_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder(Data()) == tmp_path / ".cache" / "memjax"


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file/x cannot be made .*; set data.cache or MEMJAX_CACHE"):
        cache_folder(Data(cache=str(tmp_path / "file" / "x")))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(DataError, match="is not writable; set data.cache"):
        cache_folder(Data(cache=str(tmp_path)))
