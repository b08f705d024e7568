"""A Compressive Transformer at its smallest, on bytes of the standard library: for tests.

Command:   memjax train --config=configs/compressive_tiny.py
Hardware:  2 CPU cores
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.memory import CompressiveMemory
from memjax.mixers import Attention
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            d_model=64,
            pattern=("attention",),
            repeat=2,
            mixers={"attention": Attention(heads=2)},
            memory=CompressiveMemory(memory=64, compressed=32, segment=64),
        ),
        data=Data(stream="documents", sequence=256, batch=8),
        optimizer=Optimizer(learning_rate=3e-3, warmup=20),
        train=Train(steps=200, carry=True),
    )
