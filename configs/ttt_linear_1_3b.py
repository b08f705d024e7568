"""TTT-Linear at 1.3B parameters, 26 billion tokens of text.

Command:   memjax train --config=configs/ttt_linear_1_3b.py --config.data.path=TEXT_FOLDER
Hardware:  an accelerator; raise --config.train.accumulate until a step fits its memory
Size:      1.28 billion parameters, 1.22 billion of them outside the embedding
Source:    arXiv:2407.04620, Sec. 4 and Appendix C: heads of 64; the released code puts one more
           short convolution before each layer
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.mixers import TTTLinear
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            d_model=2048,
            pattern=("ttt_linear",),
            repeat=24,
            mixers={"ttt_linear": TTTLinear(heads=32)},
            dtype="bfloat16",
            remat="dots",
        ),
        data=Data(source="text", tokenizer="bpe", vocab_size=32000, sequence=2048, batch=256),
        optimizer=Optimizer(learning_rate=1e-3, warmup=5000, final=1e-5 / 1e-3),
        train=Train(steps=50_000),
    )
