"""Mamba-2 with one attention layer, at its smallest.

Command:   memjax train --config=configs/mamba2_attention_tiny.py
Hardware:  2 CPU cores
Source:    arXiv:2405.21060, Sec. 9.2.3, where it is one layer in ten
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.mixers import Attention, Mamba2
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            d_model=64,
            pattern=("mamba2", "attention", "mamba2", "mamba2"),
            repeat=1,
            mixers={
                "mamba2": Mamba2(head_size=32, state_size=32),
                "attention": Attention(heads=2, context=256),
            },
            mlp=None,
        ),
        data=Data(stream="documents", sequence=256, batch=8),
        optimizer=Optimizer(learning_rate=3e-3, warmup=20),
        train=Train(steps=200, carry=True),
    )
