"""Associative recurrent memory at its smallest, on bytes of Python's standard library.

Command:   memjax train --config=configs/armt_tiny.py
Hardware:  2 CPU cores
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.memory import ARMT
from memjax.mixers import Attention
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            d_model=64,
            pattern=("attention",),
            repeat=2,
            mixers={"attention": Attention(heads=2, window=64)},
            memory=ARMT(slots=8, segment=64, memory_size=16),
        ),
        data=Data(stream="documents", sequence=256, batch=8),
        optimizer=Optimizer(learning_rate=3e-3, warmup=20),
        train=Train(steps=200, carry=True),
    )
