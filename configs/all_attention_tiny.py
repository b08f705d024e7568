"""All-attention at its smallest, on bytes of Python's standard library: for tests and first looks.

Command:   memjax train --config=configs/all_attention_tiny.py
Hardware:  2 CPU cores
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.mixers import AllAttention
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            d_model=64,
            pattern=("all_attention",),
            repeat=2,
            mixers={"all_attention": AllAttention(heads=2, slots=128, context=256)},
            mlp=None,
        ),
        data=Data(sequence=256, batch=8),
        optimizer=Optimizer(learning_rate=3e-3, warmup=20),
        train=Train(steps=200),
    )
