"""Gated linear attention, about 10M parameters, on the standard library.

Command:   memjax train --config=configs/gla_10m.py
Hardware:  2 CPU cores
Size:      7.4 million parameters, 6.4 million of them outside the embedding
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.mixers import GLA
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            d_model=256, pattern=("gla",), repeat=8, mixers={"gla": GLA(heads=4)}, layers="unroll"
        ),
        data=Data(tokenizer="bpe", sequence=1024, batch=8),
        optimizer=Optimizer(learning_rate=1e-3, warmup=200),
        train=Train(steps=5000),
    )
