"""Griffin at its smallest: two RG-LRU layers, then a sliding window.

Command:   memjax train --config=configs/griffin_tiny.py
Hardware:  2 CPU cores
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
            d_model=64,
            pattern=("rg_lru", "rg_lru", "attention"),
            repeat=1,
            mixers={
                "rg_lru": RGLRU(),
                "attention": Attention(heads=2, kv_heads=1, window=64),
            },
            mlp=GeGLU(ratio=3.0),
        ),
        data=Data(stream="documents", sequence=256, batch=8),
        optimizer=Optimizer(learning_rate=3e-3, warmup=20),
        train=Train(steps=200, carry=True),
    )
