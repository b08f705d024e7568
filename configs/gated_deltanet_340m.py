"""Gated DeltaNet at 340M parameters, 15 billion tokens of text.

Command:   memjax train --config=configs/gated_deltanet_340m.py --config.data.path=TEXT_FOLDER
Hardware:  an accelerator; raise --config.train.accumulate until a step fits its memory
Size:      341.8 million parameters, 309.1 million of them outside the embedding
Source:    arXiv:2412.06464: keys of 256, values of 512, 4,096 tokens a sequence;
           it has models of 1.3B, and of 400M for ablations: this depth and number of heads are ours
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.mixers import GatedDeltaNet
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            d_model=1024,
            pattern=("gated_deltanet",),
            repeat=21,
            mixers={"gated_deltanet": GatedDeltaNet(heads=3)},
            dtype="bfloat16",
            remat="dots",
        ),
        data=Data(source="text", tokenizer="bpe", vocab_size=32000, sequence=4096, batch=128),
        optimizer=Optimizer(learning_rate=4e-4, warmup=2000),
        train=Train(steps=30_000),
    )
