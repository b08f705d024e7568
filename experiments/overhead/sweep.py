"""Tiny points that differ in their seeds alone: what is left is what a sweep costs.

Command:   python experiments/overhead/measure.py
Hardware:  1 CPU core
Result:    experiments/overhead
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.mixers import LSTM
from memjax.model import Model
from memjax.sweeps import Sweep, seeds
from memjax.training.config import Checkpoint, Train


def get_sweep(points: str = "200") -> Sweep:
    base = Experiment(
        model=Model(
            d_model=16, pattern=("lstm",), repeat=1, mixers={"lstm": LSTM(unroll=1)}, mlp=None
        ),
        data=Data(sequence=32, batch=2),
        train=Train(steps=20, tensorboard=False),
        checkpoint=Checkpoint(every=10, keep=1),
    )
    return Sweep(base=base, points=seeds(int(points)))
