"""Models of one size for `memjax bench`: what a training step costs.

Command:   memjax bench --config=configs/bench.py:transformer
           variants: `transformer`, `linear`, `delta` (the layer of its paper: short convolutions,
           values twice as wide as keys), `delta_square` (keys and values of 64, no convolution),
           `linear_transformer`, `based`, `retnet`, `gla`, `deltanet`, `mom`, `rg_lru`,
           `ttt_linear`, `ttt_mlp`, `titans_lmm`, `titans_mac`, `titans_mag`, `titans_mal`,
           `hgrn2`, `mlstm` (without MLP),
           `mamba`, `mamba2` (16 layers without MLP); with attention in some layers:
           `samba`, `griffin`, `gdn_h1` (windows of 128 tokens), `mamba2_attention` (2 of 16 layers)
Hardware:  2 CPU cores
Duration:  about a minute each
Result:    experiments/throughput/
"""

from memjax.data import Data
from memjax.experiment import Experiment
from memjax.layers import GeGLU, SwiGLU
from memjax.mixers import (
    GLA,
    HGRN2,
    MLSTM,
    RGLRU,
    TTTMLP,
    Attention,
    Based,
    DeltaNet,
    GatedDeltaNet,
    LinearAttention,
    LinearTransformer,
    Mamba,
    Mamba2,
    MoM,
    RetNet,
    TitansLMM,
    TitansMAC,
    TitansMAG,
    TitansMAL,
    TTTLinear,
)
from memjax.model import Model

MIXERS = {
    "transformer": {"attention": Attention(heads=4)},
    "linear": {"linear_attention": LinearAttention(heads=4, decay="scalar")},
    "delta": {"gated_deltanet": GatedDeltaNet(heads=4)},
    "delta_square": {
        "gated_deltanet": GatedDeltaNet(heads=4, key_size=64, value_size=64, conv=None)
    },
    "linear_transformer": {"linear_transformer": LinearTransformer(heads=4)},
    "based": {"based": Based(heads=4)},
    "retnet": {"retnet": RetNet(heads=4)},
    "gla": {"gla": GLA(heads=4)},
    "deltanet": {"deltanet": DeltaNet(heads=4)},
    "mom": {"mom": MoM(heads=4)},
    "rg_lru": {"rg_lru": RGLRU(width=352)},
    "mamba": {"mamba": Mamba()},
    "mamba2": {"mamba2": Mamba2()},
    "mlstm": {"mlstm": MLSTM(heads=4)},
    "hgrn2": {"hgrn2": HGRN2()},
    "ttt_linear": {"ttt_linear": TTTLinear(heads=4)},
    "ttt_mlp": {"ttt_mlp": TTTMLP(heads=4)},
    "titans_lmm": {"titans_lmm": TitansLMM()},
    "titans_mac": {"titans_mac": TitansMAC(segment=128)},
    "titans_mag": {"titans_mag": TitansMAG(window=128)},
    "titans_mal": {"titans_mal": TitansMAL(window=128)},
}
ALONE = {"mamba": 16, "mamba2": 16, "mlstm": 8}  # layers; a mixer is a block by itself
WINDOW = Attention(heads=4, window=128)
HYBRIDS = {
    "samba": {
        "pattern": ("mamba", "attention"),
        "repeat": 4,
        "mixers": {"mamba": Mamba(), "attention": WINDOW},
    },
    "griffin": {
        "pattern": ("rg_lru", "rg_lru", "attention"),
        "repeat": 2,
        "tail": ("rg_lru", "rg_lru"),
        "mixers": {
            "rg_lru": RGLRU(width=352),
            "attention": Attention(heads=4, kv_heads=1, window=128),
        },
        "mlp": GeGLU(ratio=3.0),
    },
    "gdn_h1": {
        "pattern": ("gated_deltanet", "attention"),
        "repeat": 4,
        "mixers": {"gated_deltanet": GatedDeltaNet(heads=4), "attention": WINDOW},
    },
    "mamba2_attention": {
        "pattern": ("mamba2",) * 4 + ("attention",) + ("mamba2",) * 3,
        "repeat": 2,
        "mixers": {"mamba2": Mamba2(), "attention": Attention(heads=4)},
        "mlp": None,
    },
}


def get_config(variant: str = "transformer") -> Experiment:
    if variant in HYBRIDS:
        shape = HYBRIDS[variant]
    else:
        mixers = MIXERS[variant]
        shape = {"pattern": tuple(mixers), "repeat": ALONE.get(variant, 8), "mixers": mixers}
        shape |= {"mlp": None} if variant in ALONE else {}
    return Experiment(
        model=Model(d_model=256, layers="unroll", **{"mlp": SwiGLU(), **shape}),
        data=Data(sequence=1024, batch=2),
    )
