"""Backbones whose state is equally large, four seeds each, on books.

Command:   memjax sweep --sweep=experiments/matched_state/sweep.py --config.data.path=BOOKS
Hardware:  1 CPU core
Duration:  about a minute a point
Result:    experiments/matched_state
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.mixers import Attention, GatedDeltaNet, Mamba2, RetNet
from memjax.model import Model
from memjax.sweeps import Evaluate, Match, Sweep, axis, product, seeds
from memjax.training.config import Optimizer, Train

BACKBONES = {
    "gated_deltanet": GatedDeltaNet(heads=3),
    "attention": Attention(heads=3, window=32),
    "retnet": RetNet(heads=3),
    "mamba2": Mamba2(head_size=32, state_size=32),
}


def model(kind: str) -> Model:
    return Model(
        d_model=96, pattern=(kind,), repeat=2, mixers={kind: BACKBONES[kind]}, layers="unroll"
    )


def base() -> Experiment:
    return Experiment(
        model=model("gated_deltanet"),
        data=Data(
            source="pg19",
            tokenizer="bpe",
            vocab_size=1024,
            stream="documents",
            sequence=128,
            batch=16,
        ),
        optimizer=Optimizer(learning_rate=5e-3, warmup=30),
        train=Train(steps=300, carry=True),
    )


def get_sweep() -> Sweep:
    models = {kind: model(kind) for kind in BACKBONES}
    return Sweep(
        base=base(),
        points=product(seeds(4), axis("model", models, name="backbone")),
        match=Match(by="state"),
        evaluate=(Evaluate(split="valid", max_documents=2),),
    )
