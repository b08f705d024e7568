"""State carried from segment to segment in training, or zeroed before each; four seeds, on books.

Command:   memjax sweep --sweep=experiments/carry/sweep.py --config.data.path=BOOKS
Hardware:  1 CPU core
Duration:  about a minute a point
Result:    experiments/carry
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.mixers import GatedDeltaNet
from memjax.model import Model
from memjax.sweeps import Evaluate, Sweep, axis, product, seeds
from memjax.training.config import Optimizer, Train


def get_sweep() -> Sweep:
    base = Experiment(
        model=Model(
            d_model=96,
            repeat=2,
            mixers={"gated_deltanet": GatedDeltaNet(heads=3)},
            layers="unroll",
        ),
        data=Data(
            source="pg19",
            tokenizer="bpe",
            vocab_size=1024,
            stream="documents",
            sequence=128,
            batch=16,
        ),
        optimizer=Optimizer(learning_rate=5e-3, warmup=30),
        train=Train(steps=300),
    )
    return Sweep(
        base=base,
        points=product(
            seeds(4), axis("train.carry", {"carried": True, "zeroed": False}, name="trained")
        ),
        evaluate=(
            Evaluate(split="valid", max_documents=2, carry=True),
            Evaluate(split="valid", max_documents=2, carry=False),
        ),
    )
