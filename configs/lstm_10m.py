"""LSTM, the non-linear control, about 10M parameters, on the standard library.

Command:   memjax train --config=configs/lstm_10m.py
Hardware:  2 CPU cores
Size:      10.0 million parameters, 9.0 million of them outside the embedding
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.mixers import LSTM
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            d_model=256,
            pattern=("lstm",),
            repeat=8,
            mixers={"lstm": LSTM()},
            layers="unroll",
        ),
        data=Data(tokenizer="bpe", sequence=1024, batch=8),
        optimizer=Optimizer(learning_rate=1e-3, warmup=200),
        train=Train(steps=5000),
    )
