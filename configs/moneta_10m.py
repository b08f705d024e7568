"""Moneta, about 10M parameters, on the standard library.

Memory:    Miras with errors to the power 3 and the retention of the l4 norm
Command:   memjax train --config=configs/moneta_10m.py
Hardware:  2 CPU cores
Size:      9.0 million parameters, 7.9 million of them outside the embedding
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.mixers import Moneta
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            d_model=256,
            pattern=("moneta",),
            repeat=8,
            mixers={"moneta": Moneta(heads=4)},
            layers="unroll",
        ),
        data=Data(tokenizer="bpe", sequence=1024, batch=8),
        optimizer=Optimizer(learning_rate=1e-3, warmup=200),
        train=Train(steps=5000),
    )
