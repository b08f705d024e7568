"""Sources of text: the documents that a path holds, and the split of each.

Each function that takes a root documents the layout that it reads.
"""

import csv
import hashlib
import mmap
import os
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from memjax.data.config import Data
from memjax.data.documents import (
    SPLIT_NAMES,
    SPLITS,
    TEXT_SUFFIXES,
    Document,
    Source,
    documents_of,
    entries,
    existing,
    text_files,
    unreadable,
    whole_file,
)
from memjax.data.errors import DataError

VALID_FROM, TEST_FROM = 0.90, 0.95  # shares of a source without splits of its own


def open_source(config: Data) -> Source:
    """List the documents of `config.source` and `config.path`.

    Raises DataError for a path that is missing, unreadable or not in the layout of the source.
    """
    if config.source == "stdlib":
        return _stdlib(Path(sysconfig.get_path("stdlib")))
    if config.path is None:
        raise DataError(f"data.path=None: data.source={config.source} needs a path; set data.path")
    root = Path(config.path).expanduser().absolute()
    try:
        root.stat()
    except OSError as error:
        raise unreadable(root, error, f"check data.path={config.path}") from None
    return SOURCES[config.source](root)


def need_folder(root: Path, kind: str, expected: str) -> None:
    if not root.is_dir():
        raise DataError(f"{root} is a file; data.source={kind} needs a folder with {expected}")


def wrong_layout(root: Path, kind: str, expected: str) -> DataError:
    names = [entry.name + "/" * entry.is_dir() for entry in entries(root)]
    found = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "") if names else "nothing"
    remedy = "set data.path to the folder that holds them, or data.source=text"
    return DataError(f"{root}: data.source={kind} expects {expected}; found {found}; {remedy}")


# --- stdlib ---------------------------------------------------------------------------------

# Not library code: packages of others, tests, generated tables and what depends on the machine.
_LEFT_OUT = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}


def _stdlib(root: Path) -> Source:
    """The *.py files of the running Python's standard library, split by a hash of their names."""
    paths = []
    for path in text_files(root, without=_LEFT_OUT):
        of_machine = path.name.startswith("_sysconfigdata") or path.parent.name.startswith("config")
        if path.suffix == ".py" and not of_machine and path.is_file() and path.stat().st_size:
            paths.append(path)
    documents = documents_of(paths, root)
    missing = "this Python has no source files of its standard library; set data.source=text"
    splits = existing(_split_by_hash(documents))
    if not splits:
        raise DataError(f"{root}: {missing}")
    return Source(kind="stdlib", root=root, splits=splits, missing=missing, whole=documents)


def _hash(name: str) -> float:
    digest = hashlib.blake2b(os.fsencode(name), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _split_by_hash(documents: Sequence[Document]) -> dict[str, list[Document]]:
    """Split by a hash of each name, about 90/5/5, so that a new file moves no other.

    An empty split takes one document from the fullest one: three documents fill three splits.
    """
    split_of = {}
    for document in documents:
        value = _hash(document.name)
        late = "valid" if value < TEST_FROM else "test"
        split_of[document] = "train" if value < VALID_FROM else late
    for split in SPLITS:
        if split in split_of.values():
            continue
        held = list(split_of.values())
        fullest = max(SPLITS, key=held.count)
        if held.count(fullest) > 1:
            moved = min(
                (d for d in documents if split_of[d] == fullest), key=lambda d: _hash(d.name)
            )
            split_of[moved] = split
    return {split: [d for d in documents if split_of[d] == split] for split in SPLITS}


# --- text -----------------------------------------------------------------------------------


def _text(root: Path) -> Source:
    """A text file, or a folder of them (.txt, .md, .py and the other TEXT_SUFFIXES).

    file             cut at line ends into 90/5/5 % of its bytes, one document a split.
    folder with      train/ valid/ test/ folders, or train.txt, valid.txt, test.txt files: these are
                     the splits, each file a document, when there is a "train" among them or when
                     there is nothing else. Other files beside them are not read.
    any other        each text file below it is a document, split by a hash of its relative name
    folder           (90/5/5; no split is empty with three files or more). One file is cut as above.
    """
    if not root.is_dir():
        return _single_file(root, root.name)
    below = text_files(root)
    if not below:
        expected = f"text files ({' '.join(TEXT_SUFFIXES)})"
        names = ", ".join(entry.name for entry in entries(root)[:4]) or "nothing"
        raise DataError(f"{root} has no {expected}; found {names}; check data.path")
    named = _named_splits(root, below)
    if named:
        whole = [document for split in SPLITS for document in named.get(split, ())]
        missing = "its folders or files are named for the splits, and none for this one; add it"
        return Source(kind="text", root=root, splits=existing(named), missing=missing, whole=whole)
    if len(below) == 1:
        return _single_file(below[0], below[0].relative_to(root).as_posix())
    documents = documents_of(below, root)
    missing = f"{len(documents)} text files cannot fill three splits; add files or use split=all"
    splits = existing(_split_by_hash(documents))
    return Source(kind="text", root=root, splits=splits, missing=missing, whole=documents)


def _named_splits(root: Path, below: Sequence[Path]) -> dict[str, list[Document]]:
    """Documents by split if the entries of `root` are named for splits, else nothing."""
    splits: dict[str, list[Document]] = {}
    entry_of: dict[str, str] = {}
    others = False
    for path in below:
        entry = path.relative_to(root).parts[0]
        name = entry if (root / entry).is_dir() else Path(entry).stem
        split = SPLIT_NAMES.get(name.lower(), "all")
        if split == "all":
            others = True
            continue
        if entry_of.setdefault(split, entry) != entry:
            raise DataError(
                f"{root} has both {entry_of[split]} and {entry} for split '{split}'; keep one"
            )
        splits.setdefault(split, []).extend(documents_of([path], root))
    return {} if others and "train" not in splits else splits


def _single_file(path: Path, name: str) -> Source:
    whole = whole_file(path, name)
    cuts = _line_cuts(path, whole.stop)
    splits = {
        split: [Document(name, path, start, stop)]
        for split, start, stop in zip(SPLITS, (0, *cuts), (*cuts, whole.stop), strict=True)
        if stop > start
    }
    missing = "one file is cut into splits at line ends, and it has too few lines; use split=all"
    return Source(kind="text", root=path, splits=splits, missing=missing, whole=[whole])


def _line_cuts(path: Path, size: int) -> tuple[int, int]:
    """Bytes where "valid" and "test" begin: line ends near 90 and 95 %, three lines fill three."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            test = text.find(b"\n", int(TEST_FROM * size)) + 1
            if test in (0, size):
                test = text.rfind(b"\n", 0, size - 1) + 1
            valid = text.find(b"\n", int(VALID_FROM * size)) + 1
            if not 0 < valid < test:
                valid = text.rfind(b"\n", 0, max(test - 1, 0)) + 1
    except OSError as error:
        raise unreadable(path, error) from None
    # With one line there is no cut: everything is "train". With two, "test" stays empty.
    return (valid, test) if valid else (test or size, size)


# --- wikitext -------------------------------------------------------------------------------


def _wikitext(root: Path) -> Source:
    """WikiText as released: wiki.{train,valid,test}.tokens (words) or .raw (characters).

    Each split is one document, the stream that published results read.
    """
    expected = "wiki.{train,valid,test}.tokens or wiki.{train,valid,test}.raw"
    need_folder(root, "wikitext", expected)
    splits = {}
    for split in SPLITS:
        files = [root / f"wiki.{split}{suffix}" for suffix in (".tokens", ".raw")]
        files = [path for path in files if path.is_file()]
        if len(files) > 1:
            raise DataError(f"{root} has both {files[0].name} and {files[1].name}; keep one")
        splits[split] = documents_of(files, root)
    found = existing(splits)
    if not found:
        raise wrong_layout(root, "wikitext", expected)
    whole = [document for documents in found.values() for document in documents]
    return Source(
        kind="wikitext",
        root=root,
        splits=found,
        missing=f"looked for {expected} and found only {', '.join(d.name for d in whole)}; add it",
        whole=whole,
    )


# --- pg19 -----------------------------------------------------------------------------------


def _pg19(root: Path) -> Source:
    """PG-19: {train,validation,test}/<id>.txt, one book a document, bytes as distributed.

    metadata.csv (id, title, year, link; no header) adds titles to the names when it is there.
    """
    expected = "folders train, validation and test of <id>.txt books"
    need_folder(root, "pg19", expected)
    metadata = root / "metadata.csv"
    titles = _titles(metadata) if metadata.exists() else {}
    splits: dict[str, list[Document]] = {}
    for entry in entries(root):
        split = SPLIT_NAMES.get(entry.name, "all")
        books = [p for p in entries(entry) if p.suffix == ".txt"] if entry.is_dir() else []
        if split == "all" or not books:
            continue
        if split in splits:
            raise DataError(f"{root} has two folders for split '{split}'; keep one")
        splits[split] = [
            whole_file(book, f"{book.stem} {titles.get(book.stem, '')}".strip()) for book in books
        ]
    found = existing(splits)
    if not found:
        raise wrong_layout(root, "pg19", expected)
    return Source(
        kind="pg19",
        root=root,
        splits=found,
        missing=f"expected {expected}; found books for {', '.join(found)} only; add the folder",
        whole=[document for documents in found.values() for document in documents],
        extra=[metadata] if titles else [],
    )


def _titles(path: Path) -> dict[str, str]:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except OSError as error:
        raise unreadable(path, error) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not UTF-8 CSV ({error}); repair or remove it") from None
    bad = next((number for number, row in enumerate(rows, 1) if len(row) < 2), None)
    if bad is not None:
        raise DataError(f"{path} row {bad} is not id,title,year,link; repair or remove the file")
    return {row[0].strip(): " ".join(row[1].split()) for row in rows}


SOURCES: Mapping[str, Callable[[Path], Source]] = {
    "text": _text,
    "wikitext": _wikitext,
    "pg19": _pg19,
}
