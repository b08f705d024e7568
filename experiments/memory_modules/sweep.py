"""Every memory module on the same two layers, as large as those without one, three seeds, on books.

Command:   memjax sweep --sweep=experiments/memory_modules/sweep.py --config.data.path=BOOKS
Hardware:  1 CPU core
Duration:  70 s to 4 minutes a point
"""

import sys
from pathlib import Path

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.sweeps import Match, Sweep, axis, product, seeds
from memjax.training.config import Optimizer, Train

sys.path.insert(0, str(Path(__file__).parent))
from models import make_models  # noqa: E402

MODELS = make_models(segment=32)


def get_sweep() -> Sweep:
    base = Experiment(
        model=MODELS["none"],
        data=Data(
            source="pg19",
            tokenizer="bpe",
            vocab_size=1024,
            stream="documents",
            sequence=128,
            batch=8,
        ),
        optimizer=Optimizer(learning_rate=2e-3, warmup=100),
        train=Train(steps=2000, carry=True, tensorboard=False),
    )
    return Sweep(
        base=base,
        points=product(seeds(3), axis("model", MODELS, name="memory")),
        match=Match(by="params", change=("model.mlp.ratio",)),
    )
