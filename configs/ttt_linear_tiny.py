"""TTT-Linear at its smallest, on bytes of the standard library: for tests, first looks.

Command:   memjax train --config=configs/ttt_linear_tiny.py
Hardware:  2 CPU cores
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.mixers import TTTLinear
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            d_model=64, pattern=("ttt_linear",), repeat=2, mixers={"ttt_linear": TTTLinear(heads=2)}
        ),
        data=Data(stream="documents", sequence=256, batch=8),
        optimizer=Optimizer(learning_rate=3e-3, warmup=20),
        train=Train(steps=200, carry=True),
    )
