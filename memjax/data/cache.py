"""Token cache: a folder of tokens and document lengths, complete or absent.

    header.json      what the folder holds, sizes and checksums; has a checksum of its own
    documents.json   per document: name, tokens, words, bytes
    tokens.bin       every document: `bos_id`, then its tokens; smallest unsigned type that fits

A folder is built under a name that begins with ".part-", then renamed, so a build that is killed
or fails leaves nothing that is read, and two builds at once both succeed. Leftovers are removed by
a later build once nothing was written to them for an hour.
"""

import errno
import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np

from memjax.data.documents import Document
from memjax.data.errors import DataError
from memjax.data.progress import Advance, reading
from memjax.data.text import count_words
from memjax.data.tokenizers import PART, Tokenizer

FORMAT = 1
STALE_S = 3600.0
CHECK_BELOW = 1 << 28  # bytes of tokens whose checksum is verified at every opening
_CHUNK = 1 << 24


class Damaged(Exception):
    """A folder of the cache is not what its header says; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a folder holds.

    content    SHA-256 over the names and bytes of the documents.
    tokenizer  digest of the tokenizer.
    tokens     all ids on disk, one `bos_id` a document included.
    crc        CRC-32 of tokens.bin.
    index      SHA-256 of documents.json.
    """

    source: str
    split: str
    tokenizer: str
    vocab_size: int
    dtype: str
    documents: int
    tokens: int
    content: str
    crc: int
    index: str


@dataclass(frozen=True, kw_only=True)
class Index:
    """Per document, in the order of the corpus; `tokens` counts its `bos_id`."""

    names: list[str]
    tokens: list[int]
    words: list[int]
    bytes: list[int]


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned type that holds every id below `vocab_size`."""
    for dtype in (np.uint8, np.uint16, np.uint32):
        if vocab_size <= np.iinfo(dtype).max + 1:
            return np.dtype(dtype)
    raise DataError(f"vocabulary of {vocab_size} ids does not fit uint32; set data.vocab_size")


def build(
    folder: Path, documents: Sequence[Document], tokenizer: Tokenizer, source: str, split: str
) -> None:
    """Write the tokens of `documents` to `folder`, replacing a damaged one.

    Raises DataError for text that cannot be used, or a cache that cannot be written.
    """
    part = folder.parent / f"{PART}{folder.name}-{os.getpid()}-{os.urandom(4).hex()}"
    total = sum(document.stop - document.start for document in documents)
    try:
        remove_stale(folder.parent)
        part.mkdir(parents=True)
        with reading(f"tokenising {source} {split}", total) as advance:
            _write(part, documents, tokenizer, source, split, advance)
        _install(part, folder)
    except OSError as error:
        raise cache_error(folder.parent, error, total) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def cache_error(folder: Path, error: OSError, size: int = 0) -> DataError:
    """The DataError for an OSError in the cache, with the room that `size` bytes of text need."""
    remedy = "set data.cache or MEMJAX_CACHE to another folder"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        need = f" (may need {max(4 * size, 10**6) / 1e6:.0f} MB)" if size else ""
        return DataError(f"cache folder {folder} has no space left{need}; make room or {remedy}")
    return DataError(f"cache folder {folder} cannot be written ({error.strerror}); {remedy}")


def _write(
    part: Path,
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    source: str,
    split: str,
    advance: Advance,
) -> None:
    dtype = token_dtype(tokenizer.vocab_size)
    index = Index(names=[], tokens=[], words=[], bytes=[])
    bos = np.array([tokenizer.bos_id], dtype)
    content, crc = hashlib.sha256(), 0
    with open(part / "tokens.bin", "wb") as file:
        for document in documents:
            text = document.read()
            parts = chain([(0, bos)], tokenizer.blocks(text))
            count = 0
            for size, ids in parts:
                _check_ids(ids, tokenizer, document)
                raw = ids.astype(dtype).tobytes()
                file.write(raw)
                crc = zlib.crc32(raw, crc)
                count += len(ids)
                advance(size)
            content.update(b"%d %b\n" % (len(text), os.fsencode(document.name)))
            content.update(text)
            index.names.append(document.name)
            index.tokens.append(count)
            index.words.append(count_words(source, text))
            index.bytes.append(len(text))
        _sync(file)
    _write_json(part / "documents.json", asdict(index))
    header = Header(
        source=source,
        split=split,
        tokenizer=tokenizer.digest,
        vocab_size=tokenizer.vocab_size,
        dtype=dtype.name,
        documents=len(index.names),
        tokens=sum(index.tokens),
        content=content.hexdigest(),
        crc=crc,
        index=_sha256(part / "documents.json"),
    )
    values = {"format": FORMAT} | asdict(header)
    _write_json(part / "header.json", values | {"checksum": _checksum(values)})


def _check_ids(ids: np.ndarray, tokenizer: Tokenizer, document: Document) -> None:
    if ids.min() < 0 or ids.max() >= tokenizer.vocab_size:
        raise DataError(
            f"tokenizer gave ids {ids.min()}..{ids.max()} for {document.name}, outside its "
            f"vocabulary of {tokenizer.vocab_size}; learn the tokenizer again"
        )


def _checksum(values: dict) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _write_json(path: Path, values: dict) -> None:
    with open(path, "wb") as file:
        file.write(json.dumps(values).encode())
        _sync(file)


def _install(part: Path, folder: Path) -> None:
    """Give `part` its final name; a good folder that another process put there first stays."""
    if folder.exists():
        try:
            read(folder, verify=True)
            return
        except Damaged:
            old = folder.parent / f"{PART}old-{os.getpid()}-{os.urandom(4).hex()}"
            with suppress(FileNotFoundError):  # another process replaces it, too
                os.rename(folder, old)
            _remove(old)
    try:
        os.rename(part, folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise


def remove_stale(root: Path) -> None:
    """Remove what builds that were killed left in `root`."""
    for part in root.glob(f"{PART}*"):
        try:
            inside = part.iterdir() if part.is_dir() else ()
            newest = max(path.stat().st_mtime for path in (part, *inside))
        except OSError:  # another process renamed or removed it meanwhile
            continue
        if time.time() - newest > STALE_S:
            _remove(part)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def read(folder: Path, *, verify: bool) -> tuple[Header, Index]:
    """Header and documents of `folder`, checked against its files.

    `verify` also reads every token of a large corpus; small ones are always read.
    Raises Damaged, and DataError for a folder that may not be read.
    """
    try:
        values = json.loads((folder / "header.json").read_bytes())
        if values.pop("checksum") != _checksum(values):
            raise Damaged("header.json does not match its checksum")
        if values.pop("format") != FORMAT:
            raise Damaged("header.json has another format")
        header = Header(**values)
        if _sha256(folder / "documents.json") != header.index:
            raise Damaged("documents.json does not match its checksum")
        index = Index(**json.loads((folder / "documents.json").read_bytes()))
        _check_tokens(folder / "tokens.bin", header, verify)
        return header, index
    except PermissionError as error:
        raise DataError(
            f"cache folder {folder} is not readable ({error.strerror}); check its permissions"
        ) from None
    except OSError as error:
        name = Path(error.filename or folder).name
        raise Damaged(f"{name} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"header.json is broken ({type(error).__name__})") from None


def _check_tokens(path: Path, header: Header, verify: bool) -> None:
    size, expected = path.stat().st_size, header.tokens * np.dtype(header.dtype).itemsize
    if size != expected:
        raise Damaged(f"tokens.bin has {size} bytes, not {expected}")
    if not verify and size > CHECK_BELOW:
        return
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    if crc != header.crc:
        raise Damaged("tokens.bin does not match its checksum")
