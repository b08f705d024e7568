"""Mamba-2 of the 370M size, on text.

Command:   memjax train --config=configs/mamba2_370m.py --config.data.path=TEXT_FOLDER
Hardware:  an accelerator; raise --config.train.accumulate until a step fits its memory
Size:      349.6 million parameters, 316.9 million of them outside the embedding
Source:    arXiv:2405.21060, Sec. 9.2 (370M with its vocabulary of 50,277)
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.mixers import Mamba2
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            d_model=1024,
            pattern=("mamba2",),
            repeat=48,
            mixers={"mamba2": Mamba2()},
            mlp=None,
            dtype="bfloat16",
            remat="dots",
        ),
        data=Data(source="text", tokenizer="bpe", vocab_size=32000, sequence=2048, batch=256),
        optimizer=Optimizer(learning_rate=1.5e-3, warmup=1350, final=1e-5 / 1.5e-3),
        train=Train(steps=13_500),
    )
