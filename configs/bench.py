"""Models of one size for `memjax bench`: what a training step costs.

Command:   memjax bench --config=configs/bench.py:transformer
           variants: `transformer`, `linear`, `delta` (the layer of its paper: short convolutions,
           values twice as wide as keys), `delta_square` (keys and values of 64, no convolution)
Hardware:  2 CPU cores
Duration:  about a minute each
Result:    experiments/throughput/
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.mixers import Attention, GatedDeltaNet, LinearAttention
from memjax.model import Model

MIXERS = {
    "transformer": {"attention": Attention(heads=4)},
    "linear": {"linear_attention": LinearAttention(heads=4, decay="scalar")},
    "delta": {"gated_deltanet": GatedDeltaNet(heads=4)},
    "delta_square": {
        "gated_deltanet": GatedDeltaNet(heads=4, key_size=64, value_size=64, conv=None)
    },
}


def get_config(variant: str = "transformer") -> Experiment:
    mixers = MIXERS[variant]
    return Experiment(
        model=Model(d_model=256, pattern=tuple(mixers), repeat=8, mixers=mixers, layers="unroll"),
        data=Data(sequence=1024, batch=2),
    )
