"""Based at 1.4B parameters, 50 billion tokens of text.

Command:   memjax train --config=configs/based_1_4b.py --config.data.path=TEXT_FOLDER
Hardware:  an accelerator; raise --config.train.accumulate until a step fits its memory
Size:      1.35 billion parameters, 1.26 billion of them outside the embedding
Source:    arXiv:2402.18668 and its released code: 36 layers, windows of 256
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.layers import SwiGLU
from memjax.mixers import Attention, BaseConv, Based
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            d_model=1792,
            pattern=("base_conv", "based", "attention", "base_conv", "base_conv"),
            repeat=5,
            mixers={
                "base_conv": BaseConv(),
                "based": Based(heads=16),
                "attention": Attention(heads=16, window=256),
            },
            tail=(
                "base_conv",
                "base_conv",
                "based",
                "attention",
                "base_conv",
                "base_conv",
                "base_conv",
                "base_conv",
                "based",
                "attention",
                "base_conv",
            ),
            mlp=SwiGLU(ratio=2),
            dtype="bfloat16",
            remat="dots",
        ),
        data=Data(source="text", tokenizer="bpe", vocab_size=50257, sequence=2048, batch=256),
        optimizer=Optimizer(learning_rate=8e-4, warmup=1000),
        train=Train(steps=100_000),
    )
