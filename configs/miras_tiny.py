"""A memory of its own making: a gated MLP, robust errors, the elastic net, momentum; tiny.

Command:   memjax train --config=configs/miras_tiny.py
           another point of the space: --config.model.mixers.miras.bias.kind=l2 (docs/miras.md)
Hardware:  2 CPU cores
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.mixers import Miras
from memjax.model import Model
from memjax.training.config import Optimizer, Train
from pallas_kernels.neural_memory import ElasticNet, GatedMLP, Momentum, Robust


def get_config() -> Experiment:
    memory = Miras(
        heads=2,
        structure=GatedMLP(norm_eps=1.0),
        bias=Robust(),
        retention=ElasticNet(),
        learner=Momentum(),
        update_every=16,
    )
    return Experiment(
        model=Model(d_model=64, pattern=("miras",), repeat=2, mixers={"miras": memory}),
        data=Data(stream="documents", sequence=256, batch=8),
        optimizer=Optimizer(learning_rate=3e-3, warmup=20),
        train=Train(steps=200, carry=True),
    )
