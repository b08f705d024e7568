"""A small recurrent-memory model on books, 4,096-token BPE, memory carried along each book.

Command:   memjax train --config=configs/books_small.py --config.data.path=PG19_FOLDER
           variants: `attention` (same size, window of 256), `zeroed` (memory not carried)
Hardware:  2 CPU cores
Duration:  about 10 minutes, 15 beside other work
Result:    experiments/books: test word perplexity 2,369 of 8 books, memory carried
"""

import dataclasses

from memjax.data import Data
from memjax.evals.config import Eval
from memjax.experiment import Experiment
from memjax.mixers import Attention, GatedDeltaNet
from memjax.model import Model
from memjax.training.config import Checkpoint, Optimizer, Train


def get_config(variant: str = "gated_deltanet") -> Experiment:
    mixers = {
        "gated_deltanet": GatedDeltaNet(heads=3),
        "attention": Attention(heads=3, window=256),
    }
    kind = "gated_deltanet" if variant == "zeroed" else variant
    experiment = Experiment(
        model=Model(
            d_model=192, pattern=(kind,), repeat=4, mixers={kind: mixers[kind]}, layers="unroll"
        ),
        data=Data(source="pg19", tokenizer="bpe", stream="documents", sequence=256, batch=16),
        optimizer=Optimizer(learning_rate=3e-3, warmup=100),
        train=Train(steps=900, carry=True),
        checkpoint=Checkpoint(every=300),
        eval=Eval(every=300, tokens=60_000),
    )
    if variant == "zeroed":
        train = dataclasses.replace(experiment.train, carry=False)
        experiment = dataclasses.replace(experiment, train=train)
    return experiment
