"""The smallest config of every backbone and hybrid, on the same bytes, 300 steps each.

Command:   memjax sweep --sweep=experiments/backbones/sweep.py
Hardware:  2 CPU cores
Duration:  about 25 core-minutes
"""

from memjax.mixers import MIXERS
from memjax.sweeps import Point, Sweep, axis, chain, product

HYBRIDS = (
    "griffin",
    "samba",
    "jamba",
    "mamba2_attention",
    "gated_deltanet_h1",
    "gated_deltanet_h2",
)
SETTINGS = {
    "data.stream": "documents",
    "data.sequence": 256,
    "data.batch": 8,
    "train.carry": True,
    "train.steps": 300,
    "eval.every": 300,
}


def get_sweep() -> Sweep:
    files = {name: f"configs/{name}_tiny.py" for name in (*MIXERS, *HYBRIDS)}
    window = {"model.mixers.attention.window": 64}
    points = chain(
        axis("config", files, name="backbone"), (Point(window, {"backbone": "attention_window"}),)
    )
    return Sweep(base="configs/attention_tiny.py", points=product(points, (Point(SETTINGS),)))
