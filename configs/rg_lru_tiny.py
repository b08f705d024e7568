"""RG-LRU at its smallest, on bytes of Python's standard library: for tests and first looks.

Command:   memjax train --config=configs/rg_lru_tiny.py
Hardware:  2 CPU cores
Size:      133 thousand parameters, 117 thousand of them outside the embedding
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.layers import GeGLU
from memjax.mixers import RGLRU
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            d_model=64,
            pattern=("rg_lru",),
            repeat=2,
            mixers={"rg_lru": RGLRU()},
            mlp=GeGLU(ratio=3.0),
        ),
        data=Data(stream="documents", sequence=256, batch=8),
        optimizer=Optimizer(learning_rate=3e-3, warmup=20),
        train=Train(steps=200, carry=True),
    )
