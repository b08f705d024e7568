"""Two layers on a synthetic task: what a memory can recall and which states it can track.

Command:   memjax train --config=configs/probes.py:mqar
           variants: `mqar` (8 pairs), `mqar_many` (32 pairs), `parity`, `permutations`, `needle`,
           `copy`; another mixer with --config.model.pattern='("mamba",)'
Hardware:  2 CPU cores
Duration:  one to five minutes, by mixer
"""

from memjax.data import Data
from memjax.data.tasks import MQAR, Copy, Needle, Parity, Permutations
from memjax.evals.config import Eval
from memjax.experiment import Experiment
from memjax.model import Model
from memjax.training.config import Checkpoint, Optimizer, Train

TASKS = {
    "mqar": (MQAR(pairs=8, vocab=256), 64),
    "mqar_many": (MQAR(pairs=32, vocab=256), 128),
    "parity": (Parity(), 32),
    "permutations": (Permutations(size=5), 16),
    "needle": (Needle(), 128),
    "copy": (Copy(), 64),
}


def get_config(variant: str = "mqar") -> Experiment:
    task, length = TASKS[variant]
    return Experiment(
        model=Model(d_model=64, pattern=("gated_deltanet",), repeat=2, layers="unroll"),
        data=Data(source="task", task=task, sequence=length, batch=64),
        optimizer=Optimizer(learning_rate=3e-3, warmup=100),
        train=Train(steps=2000, tensorboard=False),
        checkpoint=Checkpoint(every=1000),
        eval=Eval(every=500, tokens=32_768),
    )
