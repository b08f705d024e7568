"""NumPy float64 loops of memory modules beside a layer, written from the papers' equations.

`ORACLES[kind](params, shared, config, x_BTD, reset_BT)` returns y_BTD from the initial state;
`params` are the module's own and `shared` those of all layers, as nested dicts of float64 arrays.
"""

from oracles.memories.lm2 import lm2
from oracles.memories.product_keys import memory_plus, product_keys

ORACLES = {
    "product_keys": product_keys,
    "memory_plus": memory_plus,
    "lm2": lm2,
}
