"""DeltaNet at 340M parameters, 15 billion tokens of text.

Command:   memjax train --config=configs/deltanet_340m.py --config.data.path=TEXT_FOLDER
Hardware:  an accelerator; raise --config.train.accumulate until a step fits its memory
Size:      335.7 million parameters, 302.9 million of them outside the embedding
Source:    arXiv:2406.06484, Sec. 4: heads of 128
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.mixers import DeltaNet
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            d_model=1024,
            pattern=("deltanet",),
            repeat=24,
            mixers={"deltanet": DeltaNet(heads=8)},
            dtype="bfloat16",
            remat="dots",
        ),
        data=Data(source="text", tokenizer="bpe", vocab_size=32000, sequence=2048, batch=256),
        optimizer=Optimizer(learning_rate=3e-4, warmup=1000, weight_decay=0.01),
        train=Train(steps=30_000),
    )
