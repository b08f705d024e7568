"""Jamba's order of layers, without its experts: one attention layer in eight; about 10M.

Command:   memjax train --config=configs/jamba_10m.py
Hardware:  2 CPU cores
Size:      8.5 million parameters, 7.5 million of them outside the embedding
Source:    arXiv:2403.19887; no positions, Mamba tells the order
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
            d_model=256,
            pattern=(*("mamba",) * 4, "attention", *("mamba",) * 3),
            repeat=1,
            mixers={"mamba": Mamba(), "attention": Attention(heads=4, kv_heads=2, position=NoPE())},
            layers="unroll",
        ),
        data=Data(tokenizer="bpe", sequence=1024, batch=8),
        optimizer=Optimizer(learning_rate=1e-3, warmup=200),
        train=Train(steps=5000),
    )
