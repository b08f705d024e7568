"""Samba at its smallest: Mamba and a sliding window in turn.

Command:   memjax train --config=configs/samba_tiny.py
Hardware:  2 CPU cores
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
            d_model=64,
            pattern=("mamba", "attention"),
            repeat=1,
            mixers={
                "mamba": Mamba(),
                "attention": Attention(heads=2, window=64),
            },
        ),
        data=Data(stream="documents", sequence=256, batch=8),
        optimizer=Optimizer(learning_rate=3e-3, warmup=20),
        train=Train(steps=200, carry=True),
    )
