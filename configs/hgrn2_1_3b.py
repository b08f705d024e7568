"""HGRN2 of the 1.3B size, 100 billion tokens of text.

Command:   memjax train --config=configs/hgrn2_1_3b.py --config.data.path=TEXT_FOLDER
Hardware:  an accelerator; raise --config.train.accumulate until a step fits its memory
Size:      1.28 billion parameters, 1.21 billion of them outside the embedding
Source:    arXiv:2404.07904 for the layer; width and depth of the 1.3B models of arXiv:2312.06635
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.mixers import HGRN2
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            d_model=2048,
            pattern=("hgrn2",),
            repeat=24,
            mixers={"hgrn2": HGRN2(expand=128)},
            dtype="bfloat16",
            remat="dots",
        ),
        data=Data(source="text", tokenizer="bpe", vocab_size=32000, sequence=2048, batch=1024),
        optimizer=Optimizer(learning_rate=3e-4, warmup=480, weight_decay=0.01),
        train=Train(steps=48_000),
    )
