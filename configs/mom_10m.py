"""Mixture of memories over gated delta rules, about 10M parameters, on the standard library.

Command:   memjax train --config=configs/mom_10m.py
Hardware:  2 CPU cores
Size:      12.3 million parameters, 11.2 million of them outside the embedding
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.mixers import MoM
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            d_model=256, pattern=("mom",), repeat=8, mixers={"mom": MoM(heads=4)}, layers="unroll"
        ),
        data=Data(tokenizer="bpe", sequence=1024, batch=8),
        optimizer=Optimizer(learning_rate=1e-3, warmup=200),
        train=Train(steps=5000),
    )
