"""Every memory module on the same two layers, as large as those without one, three seeds, on books.

Command:   memjax sweep --sweep=experiments/memory_modules/sweep.py --config.data.path=BOOKS
Hardware:  1 CPU core
Duration:  not run yet; `--dry-run` says what it would take
"""

import sys
from pathlib import Path

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.sweeps import Match, Sweep, axis, product, seeds
from memjax.training.config import Optimizer, Train

sys.path.insert(0, str(Path(__file__).parent))
from models import MODELS  # noqa: E402


def get_sweep() -> Sweep:
    base = Experiment(
        model=MODELS["none"],
        data=Data(
            source="pg19",
            tokenizer="bpe",
            vocab_size=1024,
            stream="documents",
            sequence=128,
            batch=16,
        ),
        optimizer=Optimizer(learning_rate=3e-3, warmup=30),
        train=Train(steps=300, carry=True, tensorboard=False),
    )
    return Sweep(
        base=base,
        points=product(axis("model", MODELS, name="memory"), seeds(3)),
        match=Match(by="params", change=("model.mlp.ratio",)),
    )
