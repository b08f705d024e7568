"""Mamba at its smallest, on bytes of Python's standard library: for tests and first looks.

Command:   memjax train --config=configs/mamba_tiny.py
Hardware:  2 CPU cores
Size:      147 thousand parameters, 131 thousand of them outside the embedding
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.mixers import Mamba
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            d_model=64,
            pattern=("mamba",),
            repeat=4,
            mixers={"mamba": Mamba()},
            mlp=None,
        ),
        data=Data(stream="documents", sequence=256, batch=8),
        optimizer=Optimizer(learning_rate=3e-3, warmup=20),
        train=Train(steps=200, carry=True),
    )
