"""Mamba-370M, 7 billion tokens of text.

Command:   memjax train --config=configs/mamba_370m.py --config.data.path=TEXT_FOLDER
Hardware:  an accelerator; raise --config.train.accumulate until a step fits its memory
Size:      352.8 million parameters, 320.0 million of them outside the embedding
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
            d_model=1024,
            pattern=("mamba",),
            repeat=48,
            mixers={"mamba": Mamba()},
            mlp=None,
            dtype="bfloat16",
            remat="dots",
        ),
        data=Data(source="text", tokenizer="bpe", vocab_size=32000, sequence=2048, batch=256),
        optimizer=Optimizer(learning_rate=1.5e-3, warmup=1350, final=1e-5 / 1.5e-3),
        train=Train(steps=13_500),
    )
