"""RetNet at 340M parameters, 15 billion tokens of text.

Command:   memjax train --config=configs/retnet_340m.py --config.data.path=TEXT_FOLDER
Hardware:  an accelerator; raise --config.train.accumulate until a step fits its memory
Size:      335.6 million parameters, 302.8 million of them outside the embedding
Source:    shape of arXiv:2307.08621: keys of 256, values of 512; training of arXiv:2312.06635
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.layers import SwiGLU
from memjax.mixers import RetNet
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            d_model=1024,
            pattern=("retnet",),
            repeat=24,
            mixers={"retnet": RetNet(heads=4)},
            mlp=SwiGLU(ratio=4 / 3),
            dtype="bfloat16",
            remat="dots",
        ),
        data=Data(source="text", tokenizer="bpe", vocab_size=32000, sequence=2048, batch=256),
        optimizer=Optimizer(learning_rate=3e-4, warmup=1000, weight_decay=0.01),
        train=Train(steps=30_000),
    )
