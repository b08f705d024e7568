"""Memora, about 10M parameters, on the standard library.

Memory:    Miras with the KL retention
Command:   memjax train --config=configs/memora_10m.py
Hardware:  2 CPU cores
Size:      9.0 million parameters, 7.9 million of them outside the embedding
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.mixers import Memora
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            d_model=256,
            pattern=("memora",),
            repeat=8,
            mixers={"memora": Memora(heads=4)},
            layers="unroll",
        ),
        data=Data(tokenizer="bpe", sequence=1024, batch=8),
        optimizer=Optimizer(learning_rate=1e-3, warmup=200),
        train=Train(steps=5000),
    )
