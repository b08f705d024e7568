"""Mamba-2 with attention in a tenth of the layers, about 10M parameters, standard library.

Command:   memjax train --config=configs/mamba2_attention_10m.py
Hardware:  2 CPU cores
Size:      10.0 million parameters, 8.9 million of them outside the embedding
Source:    arXiv:2405.21060, Sec. 9.2.3, for the share of attention
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.mixers import Attention, Mamba2
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            d_model=256,
            pattern=("mamba2",) * 4 + ("attention",) + ("mamba2",) * 5,
            repeat=2,
            mixers={"mamba2": Mamba2(), "attention": Attention(heads=4)},
            mlp=None,
            layers="unroll",
        ),
        data=Data(tokenizer="bpe", sequence=1024, batch=8),
        optimizer=Optimizer(learning_rate=1e-3, warmup=200),
        train=Train(steps=5000),
    )
