"""Gated DeltaNet H1: every second layer a sliding window; about 10M parameters.

Command:   memjax train --config=configs/gated_deltanet_h1_10m.py
Hardware:  2 CPU cores
Size:      7.9 million parameters, 6.9 million of them outside the embedding
Source:    arXiv:2412.06464, where the window is 2,048
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.mixers import Attention, GatedDeltaNet
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            d_model=256,
            pattern=("gated_deltanet", "attention"),
            repeat=4,
            mixers={
                "gated_deltanet": GatedDeltaNet(heads=4),
                "attention": Attention(heads=4, window=128),
            },
            layers="unroll",
        ),
        data=Data(tokenizer="bpe", sequence=1024, batch=8),
        optimizer=Optimizer(learning_rate=1e-3, warmup=200),
        train=Train(steps=5000),
    )
