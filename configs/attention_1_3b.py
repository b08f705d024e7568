"""Transformer++ (rotary positions, SwiGLU, RMSNorm) at 1.3B parameters, 100 billion tokens of text.

Command:   memjax train --config=configs/attention_1_3b.py --config.data.path=TEXT_FOLDER
Hardware:  an accelerator; raise --config.train.accumulate until a step fits its memory
Size:      1.28 billion parameters, 1.21 billion of them outside the embedding
Source:    the baseline of arXiv:2312.06635
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.mixers import Attention
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            d_model=2048,
            pattern=("attention",),
            repeat=24,
            mixers={"attention": Attention(heads=32, context=2048)},
            dtype="bfloat16",
            remat="dots",
        ),
        data=Data(source="text", tokenizer="bpe", vocab_size=32000, sequence=2048, batch=1024),
        optimizer=Optimizer(learning_rate=3e-4, warmup=480, weight_decay=0.01),
        train=Train(steps=48_000),
    )
