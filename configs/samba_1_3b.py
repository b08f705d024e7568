"""Samba at 1.3B parameters: Mamba and a sliding window in turn.

Command:   memjax train --config=configs/samba_1_3b.py --config.data.path=TEXT_FOLDER
Hardware:  an accelerator; raise --config.train.accumulate until a step fits its memory
Size:      1.33 billion parameters, 1.26 billion of them outside the embedding
Source:    arXiv:2406.07522; training of its released code, 100 billion tokens
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.mixers import Attention, Mamba
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            d_model=2304,
            pattern=("mamba", "attention"),
            repeat=9,
            mixers={"mamba": Mamba(), "attention": Attention(heads=18, window=2048)},
            dtype="bfloat16",
            remat="dots",
        ),
        data=Data(source="text", tokenizer="bpe", vocab_size=32000, sequence=4096, batch=512),
        optimizer=Optimizer(learning_rate=4e-4, warmup=480),
        train=Train(steps=48_000),
    )
