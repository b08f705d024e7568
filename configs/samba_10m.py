"""Samba: Mamba and a sliding window in turn; about 10M parameters.

Command:   memjax train --config=configs/samba_10m.py
Hardware:  2 CPU cores
Size:      8.1 million parameters, 7.0 million of them outside the embedding
Source:    arXiv:2406.07522, where the window is 2,048
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.mixers import Attention, Mamba
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            d_model=256,
            pattern=("mamba", "attention"),
            repeat=4,
            mixers={"mamba": Mamba(), "attention": Attention(heads=4, window=128)},
            layers="unroll",
        ),
        data=Data(tokenizer="bpe", sequence=1024, batch=8),
        optimizer=Optimizer(learning_rate=1e-3, warmup=200),
        train=Train(steps=5000),
    )
