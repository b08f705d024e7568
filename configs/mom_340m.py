"""Mixture of memories (gated delta rules), d_model 1024, 24 layers, 15 billion tokens of text.

Command:   memjax train --config=configs/mom_340m.py --config.data.path=TEXT_FOLDER
Hardware:  an accelerator; raise --config.train.accumulate until a step fits its memory
Size:      513.1 million parameters, 480.4 million of them outside the embedding
Source:    arXiv:2502.13685: 4 heads of 256, 4 memories of which 2 are chosen, one shared; its
           released config for the MLP, whose model of this name has 0.5 billion parameters
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.layers import SwiGLU
from memjax.mixers import MoM
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            d_model=1024,
            pattern=("mom",),
            repeat=24,
            mixers={"mom": MoM(heads=4)},
            mlp=SwiGLU(ratio=2),
            dtype="bfloat16",
            remat="dots",
        ),
        data=Data(source="text", tokenizer="bpe", vocab_size=32000, sequence=2048, batch=256),
        optimizer=Optimizer(learning_rate=3e-4, warmup=1000, weight_decay=0.01),
        train=Train(steps=30_000),
    )
