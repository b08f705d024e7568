"""Hawk (RG-LRU in every layer), about 10M parameters, on the standard library.

Command:   memjax train --config=configs/rg_lru_10m.py
Hardware:  2 CPU cores
Size:      9.4 million parameters, 8.3 million of them outside the embedding
Source:    arXiv:2402.19427
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
            d_model=256,
            pattern=("rg_lru",),
            repeat=9,
            mixers={"rg_lru": RGLRU(width=352)},
            mlp=GeGLU(ratio=3.0),
            layers="unroll",
        ),
        data=Data(tokenizer="bpe", sequence=1024, batch=8),
        optimizer=Optimizer(learning_rate=1e-3, warmup=200),
        train=Train(steps=5000),
    )
