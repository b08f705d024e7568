"""Persistent vectors instead of MLPs at their smallest, on bytes of Python's standard library.

Command:   memjax train --config=configs/persistent_tiny.py
Hardware:  2 CPU cores
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.memory import Persistent
from memjax.mixers import Attention
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            d_model=64,
            pattern=("attention",),
            repeat=2,
            mixers={"attention": Attention(heads=2, context=256)},
            memory=Persistent(slots=128),
            mlp=None,
        ),
        data=Data(sequence=256, batch=8),
        optimizer=Optimizer(learning_rate=3e-3, warmup=20),
        train=Train(steps=200),
    )
