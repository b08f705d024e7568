"""Bytes of text: checks, cuts and counts that work in blocks, so that size costs no memory."""

import re
from collections.abc import Iterator
from pathlib import Path

from memjax.data.errors import DataError

BLOCK = 1 << 20


def line_blocks(text: bytes, size: int = BLOCK) -> Iterator[tuple[int, bytes]]:
    """Cut `text` into (offset, block): blocks of about `size` bytes that end at a line end."""
    start = 0
    while start < len(text):
        stop = text.rfind(b"\n", start, start + size) + 1
        if not stop:
            stop = text.find(b"\n", start + size) + 1 or len(text)
        yield start, text[start:stop]
        start = stop


def whole_lines(text: bytes) -> Iterator[bytes]:
    """The blocks of `line_blocks`, without their offsets."""
    return (block for _, block in line_blocks(text))


# A byte that cannot end a white space character, then ASCII white space. Of the bytes that end the
# white space of Unicode, E3 80 xx is let through where it is the punctuation of Chinese.
_BEFORE_SPACE = re.compile(
    rb"(?:[!-~\x8b-\x9e\xa1-\xa7\xaa-\xae\xb0-\xbf]|\xe3\x80[\x81-\x8a])(?=[ \n])"
)


def space_blocks(text: bytes, size: int = BLOCK) -> Iterator[bytes]:
    """Cut `text` into blocks of about `size` bytes, each cut just before a run of white space.

    A pre-tokenizer that never joins a character to white space after it gives the same pieces
    for the blocks as for the whole. UTF-8 text without ASCII spaces or line ends is one block.
    """
    start = 0
    while start < len(text):
        found = _BEFORE_SPACE.search(text, start + size)
        stop = found.end() if found else len(text)
        yield text[start:stop]
        start = stop


def check_text(text: bytes, path: Path, start: int = 0) -> None:
    """Raise DataError unless `text`, found at byte `start` of `path`, is UTF-8 text."""
    if not text:
        raise DataError(f"{path} is empty; remove it or put text in it")
    zero = text.find(b"\0")
    if zero >= 0:
        raise DataError(
            f"{path} is not text: NUL byte at offset {start + zero}; remove it from the data"
        )
    for offset, block in line_blocks(text):
        try:
            block.decode("utf-8")
        except UnicodeDecodeError as error:
            at = start + offset + error.start
            raise DataError(
                f"{path} is not UTF-8: byte 0x{text[at - start]:02x} at offset {at}; "
                "convert it to UTF-8 (iconv -f ENCODING -t UTF-8)"
            ) from None


def count_lines(text: bytes) -> int:
    """Lines of `text`; the newline at its end does not begin another one."""
    return text.count(b"\n") + (not text.endswith(b"\n") and text != b"")


def count_words(source: str, text: bytes) -> int:
    """Words of a document as published perplexities count them.

    WikiText: words between white space and one `<eos>` a line (WikiText-2 test: 245,569).
    Every other source: words between white space, `len(text.split())`.
    """
    words = sum(len(block.decode("utf-8").split()) for block in whole_lines(text))
    return words + count_lines(text) if source == "wikitext" else words
