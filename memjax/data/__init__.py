"""Text to batches: sources, tokenizers, the token cache and streams indexed by the step.

    corpus = open_corpus(Data(source="wikitext", path=..., tokenizer="words"), "train")
    batch = streams.batches(config, corpus)[step]

`memjax.data.streams` is imported by itself: it needs grain.
"""

from memjax.data.config import Data, cache_folder
from memjax.data.corpus import Corpus, describe, load_tokenizer, open_corpus, open_data
from memjax.data.errors import DataError
from memjax.data.generated import TaskCorpus
from memjax.data.text import count_words
from memjax.data.tokenizers import Tokenizer

__all__ = [
    "Corpus",
    "Data",
    "DataError",
    "TaskCorpus",
    "Tokenizer",
    "cache_folder",
    "count_words",
    "describe",
    "load_tokenizer",
    "open_corpus",
    "open_data",
]
