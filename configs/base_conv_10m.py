"""Gated short convolutions alone, about 10M parameters, on the standard library.

Command:   memjax train --config=configs/base_conv_10m.py
Hardware:  2 CPU cores
Size:      7.4 million parameters, 6.3 million of them outside the embedding
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.layers import SwiGLU
from memjax.mixers import BaseConv
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            d_model=256,
            pattern=("base_conv",),
            repeat=8,
            mixers={"base_conv": BaseConv()},
            mlp=SwiGLU(ratio=2),
            layers="unroll",
        ),
        data=Data(tokenizer="bpe", sequence=1024, batch=8),
        optimizer=Optimizer(learning_rate=1e-3, warmup=200),
        train=Train(steps=5000),
    )
