"""Every backbone's smallest config on the same bytes, 300 steps each.

Command:   memjax sweep --sweep=experiments/backbones/sweep.py
Hardware:  2 CPU cores
"""

from memjax.mixers import MIXERS
from memjax.sweeps import Sweep, axis, product


def get_sweep() -> Sweep:
    files = {kind: f"configs/{kind}_tiny.py" for kind in MIXERS}
    settings = product(
        axis("config", files, name="backbone"),
        axis("train.steps", 300),
        axis("eval.every", 300),
    )
    return Sweep(base="configs/attention_tiny.py", points=settings)
