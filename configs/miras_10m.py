"""A memory of its own making: a gated MLP, robust errors, the elastic net, momentum; about 10M.

Command:   memjax train --config=configs/miras_10m.py
           another point of the space: --config.model.mixers.miras.bias.kind=l2 (docs/miras.md)
Hardware:  2 CPU cores
Size:      8.7 million parameters, 7.7 million of them outside the embedding
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.mixers import Miras
from memjax.model import Model
from memjax.training.config import Optimizer, Train
from pallas_kernels.neural_memory import ElasticNet, GatedMLP, Momentum, Robust


def get_config() -> Experiment:
    memory = Miras(
        heads=4,
        structure=GatedMLP(norm_eps=1.0),
        bias=Robust(),
        retention=ElasticNet(),
        learner=Momentum(),
    )
    return Experiment(
        model=Model(
            d_model=256,
            pattern=("miras",),
            repeat=8,
            mixers={"miras": memory},
            layers="unroll",
        ),
        data=Data(tokenizer="bpe", sequence=1024, batch=8),
        optimizer=Optimizer(learning_rate=1e-3, warmup=200),
        train=Train(steps=5000),
    )
