"""LM2's slots beside layers with a short window, at their smallest, on bytes of Python's library.

Command:   memjax train --config=configs/lm2_tiny.py
Hardware:  2 CPU cores
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.memory import LM2
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
            memory=LM2(slots=16, segment=64, heads=2),
        ),
        data=Data(stream="documents", sequence=256, batch=8),
        optimizer=Optimizer(learning_rate=3e-3, warmup=20),
        train=Train(steps=200, carry=True),
    )
