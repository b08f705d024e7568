"""Titans LMM (the deep memory alone), about 10M parameters, on the standard library.

Command:   memjax train --config=configs/titans_lmm_10m.py
Hardware:  2 CPU cores
Size:      8.5 million parameters, 7.4 million of them outside the embedding
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.mixers import TitansLMM
from memjax.mixers.deep_memory import DeepMemory
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    memory = DeepMemory(heads=4, update_every=32)
    return Experiment(
        model=Model(
            d_model=256,
            pattern=("titans_lmm",),
            repeat=8,
            mixers={"titans_lmm": TitansLMM(memory=memory)},
            layers="unroll",
        ),
        data=Data(tokenizer="bpe", sequence=1024, batch=8),
        optimizer=Optimizer(learning_rate=1e-3, warmup=200),
        train=Train(steps=5000),
    )
