"""Samba at 421M parameters: Mamba and a sliding window in turn.

Command:   memjax train --config=configs/samba_421m.py --config.data.path=TEXT_FOLDER
Hardware:  an accelerator; raise --config.train.accumulate until a step fits its memory
Size:      421.8 million parameters, 372.6 million of them outside the embedding
Source:    arXiv:2406.07522; training of its released code, 20 billion tokens
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.mixers import Attention, Mamba
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            d_model=1536,
            pattern=("mamba", "attention"),
            repeat=6,
            mixers={"mamba": Mamba(), "attention": Attention(heads=12, window=2048)},
            dtype="bfloat16",
            remat="dots",
        ),
        data=Data(source="text", tokenizer="bpe", vocab_size=32000, sequence=4096, batch=512),
        optimizer=Optimizer(learning_rate=4e-4, warmup=100),
        train=Train(steps=10_000),
    )
