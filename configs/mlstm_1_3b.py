"""xLSTM[1:0] of the 1.3B size, mLSTM blocks alone, 300 billion tokens of text.

Command:   memjax train --config=configs/mlstm_1_3b.py --config.data.path=TEXT_FOLDER
Hardware:  an accelerator; raise --config.train.accumulate until a step fits its memory
Size:      1.35 billion parameters, 1.22 billion of them outside the embedding
Source:    arXiv:2405.04517, Sec. 4.2 (1.42B with its vocabulary of 50,257);
           training is ours
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.mixers import MLSTM
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            d_model=2048,
            pattern=("mlstm",),
            repeat=48,
            mixers={"mlstm": MLSTM(heads=4)},
            mlp=None,
            tied=False,
            dtype="bfloat16",
            remat="dots",
        ),
        data=Data(source="text", tokenizer="bpe", vocab_size=32000, sequence=2048, batch=512),
        optimizer=Optimizer(learning_rate=5e-4, warmup=1000),
        train=Train(steps=286_000),
    )
