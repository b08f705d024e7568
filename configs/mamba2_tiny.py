"""Mamba-2 at its smallest, on bytes of Python's standard library: for tests and first looks.

Command:   memjax train --config=configs/mamba2_tiny.py
Hardware:  2 CPU cores
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.mixers import Mamba2
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            d_model=64,
            pattern=("mamba2",),
            repeat=4,
            mixers={"mamba2": Mamba2(head_size=32, state_size=32)},
            mlp=None,
        ),
        data=Data(stream="documents", sequence=256, batch=8),
        optimizer=Optimizer(learning_rate=3e-3, warmup=20),
        train=Train(steps=200, carry=True),
    )
