"""Mamba-1.4B, 26 billion tokens of text.

Command:   memjax train --config=configs/mamba_1_4b.py --config.data.path=TEXT_FOLDER
Hardware:  an accelerator; raise --config.train.accumulate until a step fits its memory
Size:      1.33 billion parameters, 1.27 billion of them outside the embedding
Source:    arXiv:2312.00752, Table 12 and Appendix E.2; its vocabulary has 50,280 entries
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.mixers import Mamba
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            d_model=2048,
            pattern=("mamba",),
            repeat=48,
            mixers={"mamba": Mamba()},
            mlp=None,
            dtype="bfloat16",
            remat="dots",
        ),
        data=Data(source="text", tokenizer="bpe", vocab_size=32000, sequence=2048, batch=256),
        optimizer=Optimizer(learning_rate=1e-3, warmup=5000, final=1e-5 / 1e-3),
        train=Train(steps=50_000),
    )
