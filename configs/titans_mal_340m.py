"""Titans MAL (memory as layer) at about 340M parameters, 15 billion tokens of text.

Command:   memjax train --config=configs/titans_mal_340m.py --config.data.path=TEXT_FOLDER
Hardware:  an accelerator; raise --config.train.accumulate until a step fits its memory
Size:      378.1 million parameters, 345.3 million of them outside the embedding
Source:    width and heads of arXiv:2504.13173, training of arXiv:2501.00663; layer
           shapes of that are not published: the depth is what gives this size
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.mixers import TitansMAL
from memjax.mixers.deep_memory import DeepMemory
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    memory = DeepMemory(heads=16, update_every=64)
    return Experiment(
        model=Model(
            d_model=1024,
            pattern=("titans_mal",),
            repeat=19,
            mixers={"titans_mal": TitansMAL(memory=memory, window=512)},
            dtype="bfloat16",
            remat="dots",
        ),
        data=Data(source="text", tokenizer="bpe", vocab_size=32000, sequence=4096, batch=128),
        optimizer=Optimizer(learning_rate=4e-4, warmup=2000),
        train=Train(steps=30_000),
    )
