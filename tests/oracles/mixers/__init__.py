"""NumPy float64 token loops of whole mixers, written from the papers' equations.

`ORACLES[kind](params, config, x_BTD, reset_BT)` returns y_BTD from the initial state; `params` are
the mixer's own, as nested dicts of float64 arrays.
"""

from oracles.mixers.attention import attention
from oracles.mixers.gated_deltanet import gated_deltanet
from oracles.mixers.linear_attention import linear_attention
from oracles.mixers.lstm import lstm

ORACLES = {
    "attention": attention,
    "gated_deltanet": gated_deltanet,
    "linear_attention": linear_attention,
    "lstm": lstm,
}
