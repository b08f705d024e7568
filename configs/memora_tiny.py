"""Memora at its smallest, on bytes of Python's standard library: for tests and first looks.

Memory:    Miras with the KL retention
Command:   memjax train --config=configs/memora_tiny.py
Hardware:  2 CPU cores
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.mixers import Memora
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            d_model=64,
            pattern=("memora",),
            repeat=2,
            mixers={"memora": Memora(heads=2, update_every=16)},
        ),
        data=Data(stream="documents", sequence=256, batch=8),
        optimizer=Optimizer(learning_rate=3e-3, warmup=20),
        train=Train(steps=200, carry=True),
    )
