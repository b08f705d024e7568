"""Tokenizers lose nothing they promise to keep, and count as published results count."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from memjax.data import Data, DataError, count_words
from memjax.data.sources import open_source
from memjax.data.text import count_lines, line_blocks, space_blocks
from memjax.data.tokenizers import Bpe, Bytes, Tokenizer, Words

WIKITEXT = Path(__file__).parents[1].parent / "shared" / "data" / "wikitext-2"
needs_wikitext = pytest.mark.skipif(
    not WIKITEXT.is_dir(), reason="WikiText-2 is not at ../shared/data/wikitext-2"
)

CORPUS = b"the cat sat on the mat\r\nthe dog sat on the log\r\n\r\n" * 20
HARD = [
    b"line\r\nline\r\n\r\n  indented\ttab \n",
    "naïve café — 日本語 \u3000 full-width, emoji 👩‍👩‍👧 and e\u0301".encode(),
    bytes(range(1, 32)) + b"\x7f",
    b"   leading and trailing   \n\n\n",
    b"<bos> <eos> <unk> [PAD] </s>",
    "\ufeffBOM first, no-break\u00a0space, \u2028 line separator".encode(),
    b" ",
    b"\n",
]


@pytest.fixture(scope="module")
def bpe() -> Bpe:
    return Bpe.train([CORPUS], 300)


def wikitext(split: str) -> bytes:
    (document,) = open_source(Data(source="wikitext", path=str(WIKITEXT))).documents(split)
    return document.read()


@pytest.mark.parametrize("text", HARD)
def test_bytes_and_bpe_decode_to_the_text(text, bpe):
    for tokenizer in (Bytes(), bpe):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids).encode() == text
        assert ids.dtype == np.int32
        assert tokenizer.bos_id not in ids
        assert ids.max() < tokenizer.vocab_size


def test_bpe_merges_repeated_words(bpe):
    assert len(bpe.encode(b"the cat sat")) == 3
    assert bpe.vocab_size == 257 + len(bpe.content()["merges"])


def test_bpe_never_exceeds_the_asked_size():
    assert Bpe.train([CORPUS], 270).vocab_size == 270


def test_bpe_ids_of_blocks_equal_ids_of_the_whole(bpe, monkeypatch):
    text = CORPUS + " x\n\n  y \u3000\u3000 z\n".encode() * 30 + "日本\n\n語".encode() * 30
    whole = bpe.encode(text)
    for size in (1, 7, 50):
        monkeypatch.setattr(Bpe, "_BLOCK", size)
        assert sum(1 for _ in space_blocks(text, size)) > 10
        np.testing.assert_array_equal(bpe.encode(text), whole)


def test_bpe_training_is_the_same_in_another_process(bpe, tmp_path):
    (tmp_path / "text").write_bytes(CORPUS)
    code = (
        "import sys; from memjax.data.tokenizers import Bpe;"
        "print(Bpe.train([open(sys.argv[1], 'rb').read()], 300).digest)"
    )
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", code, str(tmp_path / "text")]
    env = os.environ | {"PYTHONPATH": str(root), "PYTHONHASHSEED": "7"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    assert done.stdout.strip() == bpe.digest
    assert done.stderr == ""


def test_broken_utf8_decodes_to_a_replacement():
    assert Bytes().decode([256, 0xE6, 0x97, 65]) == "\ufffdA"


def test_saved_tokenizers_load_to_the_same_ids(bpe, tmp_path):
    for tokenizer in (Bytes(), bpe, Words.train([CORPUS])):
        tokenizer.save(tmp_path / "t.json")
        loaded = Tokenizer.load(tmp_path / "t.json")
        assert (loaded.digest, loaded.vocab_size) == (tokenizer.digest, tokenizer.vocab_size)
        assert loaded.bos_id == tokenizer.bos_id
        np.testing.assert_array_equal(loaded.encode(CORPUS), tokenizer.encode(CORPUS))


def test_digests_tell_tokenizers_apart(bpe):
    others = [Bytes(), Words.train([CORPUS]), Bpe.train([CORPUS], 265), bpe]
    assert len({tokenizer.digest for tokenizer in others}) == 4


@pytest.mark.parametrize(
    "saved",
    [
        "",
        "[]",
        '{"format": 9, "kind": "bytes"}',
        '{"format": 1, "kind": "sentences"}',
        '{"format": 1, "kind": "words", "words": ["a", "a", "<eos>", "<unk>"]}',
        '{"format": 1, "kind": "words", "words": ["a"]}',
        '{"format": 1, "kind": "bpe", "vocabulary": ["a"], "merges": [["a", "b"]]}',
    ],
)
def test_a_damaged_tokenizer_file_is_one_line(saved, tmp_path):
    (tmp_path / "t.json").write_text(saved)
    with pytest.raises(DataError, match="t.json is damaged") as caught:
        Tokenizer.load(tmp_path / "t.json")
    assert "\n" not in str(caught.value)


def test_a_missing_tokenizer_file_is_named(tmp_path):
    with pytest.raises(DataError, match="absent.json cannot be read"):
        Tokenizer.load(tmp_path / "absent.json")


@pytest.mark.parametrize("token", [-1, 257])
def test_ids_outside_the_vocabulary_do_not_decode(token):
    with pytest.raises(DataError, match="not in the vocabulary"):
        Bytes().decode([65, token])


def test_words_follow_the_wikitext_protocol():
    text = b"b a a\n\n A b a"
    words = Words.train([text])
    assert words.content()["words"] == ["a", "<eos>", "b", "A", "<unk>"]
    assert words.encode(text).tolist() == [2, 0, 0, 1, 1, 3, 2, 0, 1]
    assert words.encode(b"a new\n").tolist() == [0, 4, 1]
    assert words.bos_id == 1
    assert words.decode([2, 0, 1, 1, 3, 4]) == "b a\n\nA <unk>"


def test_a_word_cap_drops_the_rarest_but_never_the_special_ones():
    words = Words.train([b"a a a b b c <unk>\n"], 4)
    assert words.content()["words"] == ["a", "b", "<unk>", "<eos>"]
    assert words.encode(b"c\n").tolist() == [2, 3]


def test_the_newline_at_the_end_begins_no_line():
    assert [count_lines(text) for text in (b"", b"a", b"a\n", b"a\n\n", b"a\nb", b"\n")] == [
        0,
        1,
        1,
        2,
        2,
        1,
    ]


def test_cuts_into_blocks_keep_every_byte():
    text = "ab cd\r\n\n é\n".encode() * 9 + b"tail"
    for size in (1, 5, 64):
        assert b"".join(block for _, block in line_blocks(text, size)) == text
        assert b"".join(space_blocks(text, size)) == text
        offsets = [offset for offset, _ in line_blocks(text, size)]
        assert all(text[offset - 1 : offset] == b"\n" for offset in offsets[1:])


def test_words_count_line_ends_for_wikitext_alone():
    text = "one two\r\n\n three\u00a0four".encode()
    assert count_words("wikitext", text) == 4 + 3
    assert count_words("pg19", text) == count_words("text", text) == 4


@needs_wikitext
def test_wikitext2_has_the_published_vocabulary_and_token_counts():
    words = Words.train([wikitext("train")])
    assert words.vocab_size == 33_278
    published = {"train": 2_088_628, "valid": 217_646, "test": 245_569}
    for split, tokens in published.items():
        text = wikitext(split)
        assert len(words.encode(text)) == tokens
        assert count_words("wikitext", text) == tokens
    assert count_words("text", wikitext("test")) == 241_211
