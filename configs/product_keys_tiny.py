"""Product keys in place of every second MLP at its smallest, on bytes of Python's library.

Command:   memjax train --config=configs/product_keys_tiny.py
Hardware:  2 CPU cores
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.memory import ProductKeys
from memjax.mixers import Attention
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            d_model=64,
            pattern=("attention", "attention"),
            repeat=2,
            mixers={"attention": Attention(heads=2, context=256)},
            memory=ProductKeys(at=(1,), keys=64, heads=2, top_k=8, query_size=32),
        ),
        data=Data(sequence=256, batch=8),
        optimizer=Optimizer(learning_rate=3e-3, warmup=20),
        train=Train(steps=200),
    )
