"""Sweeps: one question put to many configs, run to the end whatever happens in between.

    from memjax.sweeps import Sweep, axis, product, seeds

    def get_sweep() -> Sweep:
        return Sweep(
            base="configs/quickstart.py",
            points=product(axis("model.d_model", 64, 128), seeds(3)),
        )

`memjax sweep --sweep=FILE` runs it; `docs/sweeps.md` explains the rest.
"""

from memjax.match import Match
from memjax.sweeps.space import (
    Choice,
    Point,
    Space,
    Uniform,
    axis,
    chain,
    draw,
    product,
    sample,
    seeds,
    when,
    zipped,
)
from memjax.sweeps.spec import Evaluate, Search, Sweep, load_sweep
from memjax.sweeps.stopping import Halving, Median

__all__ = [
    "Choice",
    "Evaluate",
    "Halving",
    "Match",
    "Median",
    "Point",
    "Search",
    "Space",
    "Sweep",
    "Uniform",
    "axis",
    "chain",
    "draw",
    "load_sweep",
    "product",
    "sample",
    "seeds",
    "when",
    "zipped",
]
