"""Based at its smallest, on bytes of the standard library: for tests, first looks.

Command:   memjax train --config=configs/based_tiny.py
Hardware:  2 CPU cores
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.mixers import Attention, BaseConv, Based
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            d_model=64,
            pattern=("base_conv", "based", "attention"),
            repeat=2,
            mixers={
                "base_conv": BaseConv(),
                "based": Based(heads=2),
                "attention": Attention(heads=2, window=64),
            },
        ),
        data=Data(stream="documents", sequence=256, batch=8),
        optimizer=Optimizer(learning_rate=3e-3, warmup=20),
        train=Train(steps=200, carry=True),
    )
