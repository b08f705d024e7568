"""Griffin at 7B parameters.

Command:   memjax train --config=configs/griffin_7b.py --config.data.path=TEXT_FOLDER
Hardware:  an accelerator; raise --config.train.accumulate until a step fits its memory
Size:      6.88 billion parameters, 6.75 billion of them outside the embedding
Source:    arXiv:2402.19427; training is ours
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.layers import GeGLU
from memjax.mixers import RGLRU, Attention
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            d_model=4096,
            pattern=("rg_lru", "rg_lru", "attention"),
            repeat=10,
            mixers={
                "rg_lru": RGLRU(width=5632, heads=32),
                "attention": Attention(heads=32, kv_heads=1, window=1024),
            },
            tail=("rg_lru", "rg_lru"),
            mlp=GeGLU(ratio=3.0),
            dtype="bfloat16",
            remat="dots",
        ),
        data=Data(source="text", tokenizer="bpe", vocab_size=32000, sequence=2048, batch=512),
        optimizer=Optimizer(learning_rate=2e-4, warmup=1000),
        train=Train(steps=300_000),
    )
