"""Based, about 10M parameters, on the standard library.

Command:   memjax train --config=configs/based_10m.py
Hardware:  2 CPU cores
Size:      6.6 million parameters, 5.6 million of them outside the embedding
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.layers import SwiGLU
from memjax.mixers import Attention, BaseConv, Based
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            d_model=256,
            pattern=("base_conv", "based", "attention", "base_conv"),
            repeat=2,
            mixers={
                "base_conv": BaseConv(),
                "based": Based(heads=4),
                "attention": Attention(heads=4, window=128),
            },
            mlp=SwiGLU(ratio=2),
            layers="unroll",
        ),
        data=Data(tokenizer="bpe", sequence=1024, batch=8),
        optimizer=Optimizer(learning_rate=1e-3, warmup=200),
        train=Train(steps=5000),
    )
