"""Titans MAL (memory as layer), about 10M parameters, on the standard library.

Command:   memjax train --config=configs/titans_mal_10m.py
Hardware:  2 CPU cores
Size:      10.6 million parameters, 9.5 million of them outside the embedding
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.mixers import TitansMAL
from memjax.mixers.deep_memory import DeepMemory
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    memory = DeepMemory(heads=4, update_every=32)
    return Experiment(
        model=Model(
            d_model=256,
            pattern=("titans_mal",),
            repeat=8,
            mixers={"titans_mal": TitansMAL(memory=memory, window=128)},
            layers="unroll",
        ),
        data=Data(tokenizer="bpe", sequence=1024, batch=8),
        optimizer=Optimizer(learning_rate=1e-3, warmup=200),
        train=Train(steps=5000),
    )
