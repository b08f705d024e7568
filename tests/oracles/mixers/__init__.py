"""NumPy float64 token loops of whole mixers, written from the papers' equations.

`ORACLES[kind](params, config, x_BTD, reset_BT)` returns y_BTD from the initial state; `params` are
the mixer's own, as nested dicts of float64 arrays.
"""

from oracles.mixers.all_attention import all_attention
from oracles.mixers.attention import attention
from oracles.mixers.base_conv import base_conv
from oracles.mixers.based import based
from oracles.mixers.compressive import compressive
from oracles.mixers.deltanet import deltanet
from oracles.mixers.gated_deltanet import gated_deltanet
from oracles.mixers.gla import gla
from oracles.mixers.hgrn2 import hgrn2
from oracles.mixers.infini import infini
from oracles.mixers.landmark import landmark
from oracles.mixers.linear_attention import linear_attention
from oracles.mixers.linear_transformer import linear_transformer
from oracles.mixers.lstm import lstm
from oracles.mixers.mamba import mamba
from oracles.mixers.mamba2 import mamba2
from oracles.mixers.memorizing import memorizing
from oracles.mixers.miras import miras
from oracles.mixers.mlstm import mlstm
from oracles.mixers.mom import mom
from oracles.mixers.retnet import retnet
from oracles.mixers.rg_lru import rg_lru
from oracles.mixers.titans import titans_lmm, titans_mac, titans_mag, titans_mal
from oracles.mixers.transformer_xl import transformer_xl
from oracles.mixers.ttt import ttt_linear, ttt_mlp

ORACLES = {
    "all_attention": all_attention,
    "attention": attention,
    "base_conv": base_conv,
    "based": based,
    "deltanet": deltanet,
    "gated_deltanet": gated_deltanet,
    "gla": gla,
    "linear_attention": linear_attention,
    "linear_transformer": linear_transformer,
    "lstm": lstm,
    "mom": mom,
    "retnet": retnet,
    "mamba": mamba,
    "rg_lru": rg_lru,
    "mamba2": mamba2,
    "ttt_linear": ttt_linear,
    "ttt_mlp": ttt_mlp,
    "mlstm": mlstm,
    "hgrn2": hgrn2,
    "titans_lmm": titans_lmm,
    "titans_mac": titans_mac,
    "titans_mag": titans_mag,
    "titans_mal": titans_mal,
    "miras": miras,
    "moneta": miras,
    "yaad": miras,
    "memora": miras,
    "transformer_xl": transformer_xl,
    "infini": infini,
    "landmark": landmark,
    "compressive": compressive,
    "memorizing": memorizing,
}
