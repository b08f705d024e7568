"""xLSTM[1:0] of the 350M size, mLSTM blocks alone, 15 billion tokens of text.

Command:   memjax train --config=configs/mlstm_350m.py --config.data.path=TEXT_FOLDER
Hardware:  an accelerator; raise --config.train.accumulate until a step fits its memory
Size:      371.8 million parameters, 306.3 million of them outside the embedding
Source:    arXiv:2405.04517, Sec. 4.2 (409M with its vocabulary of 50,257);
           learning rate and warm-up are ours
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.mixers import MLSTM
from memjax.model import Model
from memjax.training.config import Optimizer, Train


def get_config() -> Experiment:
    return Experiment(
        model=Model(
            d_model=1024,
            pattern=("mlstm",),
            repeat=48,
            mixers={"mlstm": MLSTM(heads=4)},
            mlp=None,
            tied=False,
            dtype="bfloat16",
            remat="dots",
        ),
        data=Data(source="text", tokenizer="bpe", vocab_size=32000, sequence=2048, batch=256),
        optimizer=Optimizer(learning_rate=7e-4, warmup=1000),
        train=Train(steps=30_000),
    )
