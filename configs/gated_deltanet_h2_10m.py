"""Gated DeltaNet H2: Mamba-2, Gated DeltaNet, sliding window in turn; about 10M parameters.

Command:   memjax train --config=configs/gated_deltanet_h2_10m.py
Hardware:  2 CPU cores
Size:      9.2 million parameters, 8.1 million of them outside the embedding
Source:    arXiv:2412.06464, where the window is 2,048
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.mixers import Attention, GatedDeltaNet, Mamba2
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            d_model=256,
            pattern=("mamba2", "gated_deltanet", "attention"),
            repeat=3,
            mixers={
                "mamba2": Mamba2(),
                "gated_deltanet": GatedDeltaNet(heads=4),
                "attention": Attention(heads=4, window=128),
            },
            layers="unroll",
        ),
        data=Data(tokenizer="bpe", sequence=1024, batch=8),
        optimizer=Optimizer(learning_rate=1e-3, warmup=200),
        train=Train(steps=5000),
    )
