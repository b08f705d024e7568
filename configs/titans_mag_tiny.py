"""Titans MAG (memory as gate) at its smallest, on bytes of the standard library: for tests.

Command:   memjax train --config=configs/titans_mag_tiny.py
Hardware:  2 CPU cores
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.mixers import TitansMAG
from memjax.mixers.deep_memory import DeepMemory
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    memory = DeepMemory(heads=2, update_every=16)
    return Experiment(
        model=Model(
            d_model=64,
            pattern=("titans_mag",),
            repeat=2,
            mixers={"titans_mag": TitansMAG(memory=memory, window=32)},
        ),
        data=Data(stream="documents", sequence=256, batch=8),
        optimizer=Optimizer(learning_rate=3e-3, warmup=20),
        train=Train(steps=200, carry=True),
    )
