"""What to read, how to cut it into tokens and how to stream it."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from memjax import platform
from memjax.config import check, check_at_least
from memjax.data.errors import DataError
from memjax.data.tasks import TaskField

SourceName = Literal["stdlib", "text", "wikitext", "pg19", "task"]
TokenizerName = Literal["bytes", "bpe", "words"]
StreamName = Literal["packed", "documents"]

DEFAULT_BPE_SIZE = 4096
SMALLEST_BPE = 258  # 256 bytes, the document start and one merge
LARGEST_VOCABULARY = 2**31  # token ids reach the model as int32


@dataclass(frozen=True, kw_only=True)
class Data:
    """A corpus, its tokenizer and its stream of batches.

    source     "stdlib": the standard library of the running Python, always there, about 8 MB of
               source code (it differs between Python versions); "text": a file or a folder;
               "wikitext": a folder with wiki.{train,valid,test}.tokens or .raw; "pg19": a folder
               with {train,validation,test}/<id>.txt. See `memjax.data.sources`.
    path       the file or folder of the source; None for "stdlib". The others need it when they
               are opened, not before, so that a config file may leave it to the command line.
    tokenizer  "bytes", "bpe" (trained on the training split) or "words" (WikiText protocol).
    vocab_size ids in all: the size of "bpe" (None: 4,096), a cap for "words" (None: every word of
               the training split); None for "bytes" (257).
    stream     "packed": shuffled windows; "documents": row r of a step continues row r of the step
               before. See `memjax.data.streams`.
    sequence   tokens a segment.
    batch      rows a step, over all processes.
    seed       order of windows and documents.
    cache      folder for tokens and vocabularies; None: $MEMJAX_CACHE, or ~/.cache/memjax.
    threads    threads that read ahead; 0 reads in the calling thread.
    """

    source: SourceName = "stdlib"
    path: str | None = None
    task: TaskField | None = None
    tokenizer: TokenizerName = "bytes"
    vocab_size: int | None = None
    stream: StreamName = "packed"
    sequence: int = 512
    batch: int = 8
    seed: int = 0
    cache: str | None = None
    threads: int = 2

    def __post_init__(self):
        check_at_least(self, 1, "sequence", "batch")
        check_at_least(self, 0, "seed", "threads")
        self._check_vocabulary()
        is_task = self.source == "task"
        check(self, "task", (self.task is not None) == is_task, 'goes with source="task" alone')
        plain = not is_task or self.tokenizer == "bytes"
        check(self, "tokenizer", plain, "is not used with source=task; leave it out")
        given = self.path is not None
        check(self, "path", self.path != "", "must name a file or folder, or be none")
        check(
            self,
            "path",
            not (given and self.source in ("stdlib", "task")),
            f"is not read with source={self.source}; set source=text, wikitext or pg19, "
            "or drop path",
        )

    def _check_vocabulary(self) -> None:
        unset = self.vocab_size is None
        check(
            self,
            "vocab_size",
            unset or self.tokenizer != "bytes",
            "must be none with tokenizer=bytes, whose vocabulary is 257; or set tokenizer=bpe",
        )
        least = SMALLEST_BPE if self.tokenizer == "bpe" else 3
        check_at_least(self, least, "vocab_size")
        fits = self.vocab_size is None or self.vocab_size <= LARGEST_VOCABULARY
        check(self, "vocab_size", fits, f"must be at most {LARGEST_VOCABULARY}: ids are int32")


def cache_folder(config: Data) -> Path:
    """The cache folder of `config`, made if it is missing. Raises DataError if it cannot be."""
    chosen = config.cache or platform.cache_folder()
    remedy = "set data.cache or MEMJAX_CACHE to a folder you can write to"
    try:
        folder = Path(chosen).expanduser().resolve()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        raise DataError(f"cache folder {chosen} cannot be made ({error}); {remedy}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise DataError(f"cache folder {folder} is not writable; {remedy}")
    return folder
