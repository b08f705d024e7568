"""Gated DeltaNet at 1.3B parameters, 100 billion tokens of text.

Command:   memjax train --config=configs/gated_deltanet_1_3b.py --config.data.path=TEXT_FOLDER
Hardware:  an accelerator; raise --config.train.accumulate until a step fits its memory
Size:      1.30 billion parameters, 1.24 billion of them outside the embedding
Source:    arXiv:2412.06464: keys of 256, values of 512, 4,096 tokens a sequence
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.mixers import GatedDeltaNet
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            d_model=2048,
            pattern=("gated_deltanet",),
            repeat=21,
            mixers={"gated_deltanet": GatedDeltaNet(heads=6)},
            dtype="bfloat16",
            remat="dots",
        ),
        data=Data(source="text", tokenizer="bpe", vocab_size=32000, sequence=4096, batch=128),
        optimizer=Optimizer(learning_rate=4e-4, warmup=2000),
        train=Train(steps=190_000),
    )
