"""MambaByte at 353M parameters, on bytes.

Command:   memjax train --config=configs/mambabyte_353m.py --config.data.path=TEXT_FOLDER
Hardware:  an accelerator; raise --config.train.accumulate until a step fits its memory
Size:      353.6 million parameters, 353.4 million of them outside the embedding
Source:    arXiv:2401.13660; the learning rate is ours
Protocol:  bits a byte. A word's perplexity is 2^(bits a byte x bytes / words) of the same text;
           memjax eval --task=pg19 reports both, over whole books.
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.mixers import Mamba
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            d_model=1024,
            pattern=("mamba",),
            repeat=53,
            mixers={"mamba": Mamba()},
            mlp=None,
            dtype="bfloat16",
            remat="dots",
        ),
        data=Data(source="text", tokenizer="bytes", sequence=8192, batch=48),
        optimizer=Optimizer(learning_rate=4e-4, warmup=500),
        train=Train(steps=80_000),
    )
