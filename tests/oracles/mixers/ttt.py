"""arXiv:2407.04620, token by token, weights explicit."""

import numpy as np

from oracles.mixers.parts import rotate, short_conv, sigmoid
from oracles.ttt import gelu, ttt


def ttt_linear(params, config, x_BTD, reset_BT):
    return _layer(params, config, x_BTD, reset_BT, ("weight", "bias"))


def ttt_mlp(params, config, x_BTD, reset_BT):
    names = ("weight_in", "bias_in", "weight_out", "bias_out")
    return _layer(params, config, x_BTD, reset_BT, names)


def _layer(params, config, x_BTD, reset_BT, names):
    around, (batch, tokens, width) = params["backbone"], x_BTD.shape
    shape = (batch, tokens, config.heads, width // config.heads)
    q, k, v, rate = np.zeros(shape), np.zeros(shape), np.zeros(shape), np.zeros(shape[:3])
    for lane, x_TD in enumerate(x_BTD):
        shared = x_TD @ around["shared"]["weight"].T
        streams = []
        for name in ("query_conv", "key_conv"):
            stream = shared
            if config.conv:
                conv = around[name]
                stream = short_conv(shared, reset_BT[lane], conv["weight"]) + conv["bias"]
            streams.append(stream.reshape(shape[1:]))
        v[lane] = (x_TD @ around["value"]["weight"].T).reshape(shape[1:])
        scores = x_TD @ around["rate"]["weight"].T + around["rate"]["bias"]
        rate[lane] = config.base_rate * sigmoid(scores) / shape[3]
        place = -1
        for t in range(tokens):
            place = 0 if reset_BT[lane, t] else (place + 1) % config.update_every
            for out, stream in zip((q, k), streams):
                out[lane, t] = rotate(stream[t], place, config.rotary_base)
    place_rate = np.maximum(1 / np.arange(1, config.update_every + 1) + around["place"], 0)
    memory, norm = [params[name] for name in names], (around["scale"], around["shift"])
    o, _ = ttt(q, k, v, rate, place_rate, memory, norm, reset_BT)
    o_BTD = o.reshape(x_BTD.shape)
    centred = o_BTD - o_BTD.mean(-1, keepdims=True)
    o_BTD = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    o_BTD = o_BTD * around["post_scale"] + around["post_shift"]
    return (o_BTD * gelu(x_BTD @ around["gate"]["weight"].T)) @ around["out"]["weight"].T
