"""TTT-Linear, about 10M parameters, on the standard library.

Command:   memjax train --config=configs/ttt_linear_10m.py
Hardware:  2 CPU cores
Size:      7.5 million parameters, 6.5 million of them outside the embedding
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.mixers import TTTLinear
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            d_model=256,
            pattern=("ttt_linear",),
            repeat=8,
            mixers={"ttt_linear": TTTLinear(heads=4)},
            layers="unroll",
        ),
        data=Data(tokenizer="bpe", sequence=1024, batch=8),
        optimizer=Optimizer(learning_rate=1e-3, warmup=200),
        train=Train(steps=5000),
    )
