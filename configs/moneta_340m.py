"""Moneta at about 340M parameters, 15 billion tokens of text.

Memory:    Miras with errors to the power 3 and the retention of the l4 norm
Command:   memjax train --config=configs/moneta_340m.py --config.data.path=TEXT_FOLDER
Hardware:  an accelerator; raise --config.train.accumulate until a step fits its memory
Size:      374.1 million parameters, 341.3 million of them outside the embedding
Source:    arXiv:2504.13173, Eqs. 24-25; width, depth, heads, tokens and learning rate
           of its table of model sizes
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.mixers import Moneta
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            d_model=1024,
            pattern=("moneta",),
            repeat=24,
            mixers={"moneta": Moneta(heads=16, update_every=64)},
            dtype="bfloat16",
            remat="dots",
        ),
        data=Data(source="text", tokenizer="bpe", vocab_size=32000, sequence=4096, batch=128),
        optimizer=Optimizer(learning_rate=1.5e-3, warmup=2000),
        train=Train(steps=30_000),
    )
