"""RecurrentGemma at 2B parameters outside the embedding: Griffin with capped logits.

Command:   memjax train --config=configs/recurrentgemma_2b.py --config.data.path=TEXT_FOLDER
Hardware:  an accelerator; raise --config.train.accumulate until a step fits its memory
Size:      2.11 billion parameters, 2.03 billion of them outside the embedding
Source:    arXiv:2404.07839, without its factor sqrt(d_model) on embeddings; training is ours
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
            d_model=2560,
            pattern=("rg_lru", "rg_lru", "attention"),
            repeat=8,
            mixers={
                "rg_lru": RGLRU(width=2560, heads=10),
                "attention": Attention(heads=10, kv_heads=1, window=2048),
            },
            tail=("rg_lru", "rg_lru"),
            mlp=GeGLU(ratio=3.0),
            logit_cap=30.0,
            dtype="bfloat16",
            remat="dots",
        ),
        data=Data(source="text", tokenizer="bpe", vocab_size=32000, sequence=8192, batch=128),
        optimizer=Optimizer(learning_rate=2e-4, warmup=1000),
        train=Train(steps=100_000),
    )
