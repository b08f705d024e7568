"""Documents and splits: what a source is made of, and how files are listed.

A source only lists its documents; the bytes are read when they are needed, exactly as they are on
disk. Splits are "train", "valid" and "test" ("validation", "val" and "dev" also name "valid");
"all" is every document of the source, for evaluation on text that has no splits.
"""

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from memjax.data.errors import DataError
from memjax.data.text import check_text

SPLITS = ("train", "valid", "test")
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
    "test": "test",
    "all": "all",
}
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".tex", ".org", ".tokens", ".raw", ".py")


class Document(NamedTuple):
    """One document: a file, or the part of a file from byte `start` to `stop`."""

    name: str
    path: Path
    start: int
    stop: int

    def read(self) -> bytes:
        """The bytes of the document. Raises DataError if they cannot be read or are not UTF-8."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.start)
                text = file.read(self.stop - self.start)
        except OSError as error:
            raise unreadable(self.path, error) from None
        if len(text) != self.stop - self.start:
            raise DataError(f"{self.path} became shorter while it was read; run again")
        check_text(text, self.path, self.start)
        return text


@dataclass(frozen=True, kw_only=True)
class Source:
    """The documents of a path.

    splits   split -> documents, only the splits that exist.
    missing  one line that says what a missing split needs.
    whole    every document, not cut into splits.
    extra    other files whose content matters (titles).
    """

    kind: str
    root: Path
    splits: Mapping[str, Sequence[Document]]
    missing: str
    whole: Sequence[Document]
    extra: Sequence[Path] = ()

    def documents(self, split: str) -> Sequence[Document]:
        """Documents of `split`, in the order of the corpus. Raises DataError if there is none."""
        split = split_name(split)
        found = self.whole if split == "all" else self.splits.get(split, ())
        if not found:
            raise DataError(f"{self.root} has no split '{split}': {self.missing}")
        return found


def split_name(name: str) -> str:
    """The split that `name` means: train, valid, test or all."""
    if name not in SPLIT_NAMES:
        raise DataError(f"split={name!r} must be one of {', '.join((*SPLITS, 'all'))}")
    return SPLIT_NAMES[name]


def unreadable(path: Path, error: OSError, remedy: str = "check its permissions") -> DataError:
    reason = {
        FileNotFoundError: "does not exist",
        PermissionError: "is not readable (permission denied)",
    }.get(type(error), f"cannot be read ({error.strerror})")
    return DataError(f"{path} {reason}; {remedy}")


def entries(folder: Path) -> list[Path]:
    """Files and folders in `folder`, by name, without hidden ones."""
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise unreadable(folder, error) from None


def text_files(folder: Path, without: Collection[str] = ()) -> list[Path]:
    """Text files below `folder`, by relative name, without hidden ones and folders `without`."""
    found: list[Path] = []

    def fail(error: OSError):
        raise unreadable(Path(error.filename or folder), error) from None

    seen: set[str] = set()  # a link to a folder above would never end
    for base, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(base)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        kept = [name for name in folders if not name.startswith(".") and name not in without]
        folders[:] = sorted(kept)
        found += [
            Path(base, name)
            for name in files
            if not name.startswith(".") and name.lower().endswith(TEXT_SUFFIXES)
        ]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def whole_file(path: Path, name: str) -> Document:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise unreadable(path, error) from None
    if not size:
        raise DataError(f"{path} is empty; remove it or put text in it")
    return Document(name, path, 0, size)


def documents_of(paths: Iterable[Path], root: Path) -> list[Document]:
    return [whole_file(path, path.relative_to(root).as_posix()) for path in paths]


def existing(splits: Mapping[str, Sequence[Document]]) -> dict[str, Sequence[Document]]:
    return {split: splits[split] for split in SPLITS if splits.get(split)}
