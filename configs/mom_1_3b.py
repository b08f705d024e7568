"""Mixture of memories (gated delta rules), d_model 2048, 24 layers, 100 billion tokens of text.

Command:   memjax train --config=configs/mom_1_3b.py --config.data.path=TEXT_FOLDER
Hardware:  an accelerator; raise --config.train.accumulate until a step fits its memory
Size:      1.53 billion parameters, 1.46 billion of them outside the embedding
Source:    arXiv:2502.13685: 4 heads of 256, 4 memories of which 2 are chosen, one shared; the
           ratio of the MLP is ours
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.mixers import MoM
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            d_model=2048,
            pattern=("mom",),
            repeat=24,
            mixers={"mom": MoM(heads=4, key_size=256, value_size=256)},
            dtype="bfloat16",
            remat="dots",
        ),
        data=Data(source="text", tokenizer="bpe", vocab_size=32000, sequence=2048, batch=1024),
        optimizer=Optimizer(learning_rate=3e-4, warmup=480, weight_decay=0.01),
        train=Train(steps=48_000),
    )
