"""Jamba's mixers at their smallest: Mamba, and attention without positions in one layer of four.

Command:   memjax train --config=configs/jamba_tiny.py
Hardware:  2 CPU cores
Source:    arXiv:2403.19887, where it is one in eight
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.mixers import Attention, Mamba
from memjax.model import Model
from memjax.positions import NoPE
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            d_model=64,
            pattern=("mamba", "mamba", "attention", "mamba"),
            repeat=1,
            mixers={
                "mamba": Mamba(),
                "attention": Attention(heads=2, position=NoPE(), context=256),
            },
        ),
        data=Data(stream="documents", sequence=256, batch=8),
        optimizer=Optimizer(learning_rate=3e-3, warmup=20),
        train=Train(steps=200, carry=True),
    )
