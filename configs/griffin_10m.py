"""Griffin: two RG-LRU layers, then a sliding window; about 10M parameters.

Command:   memjax train --config=configs/griffin_10m.py
Hardware:  2 CPU cores
Size:      8.9 million parameters, 7.8 million of them outside the embedding
Source:    arXiv:2402.19427, where the window is 1,024
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.layers import GeGLU
from memjax.mixers import RGLRU, Attention
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            d_model=256,
            pattern=("rg_lru", "rg_lru", "attention"),
            repeat=3,
            mixers={
                "rg_lru": RGLRU(width=352),
                "attention": Attention(heads=4, kv_heads=1, window=128),
            },
            mlp=GeGLU(ratio=3.0),
            layers="unroll",
        ),
        data=Data(tokenizer="bpe", sequence=1024, batch=8),
        optimizer=Optimizer(learning_rate=1e-3, warmup=200),
        train=Train(steps=5000),
    )
