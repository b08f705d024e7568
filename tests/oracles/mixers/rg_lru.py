"""arXiv:2402.19427, Eqs. 1 to 4 and Figure 2, one token at a time."""

import numpy as np

from oracles.mixers.parts import short_conv, sigmoid


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def rg_lru(params, config, x_BTD, reset_BT):
    out_BTD = np.zeros_like(x_BTD)
    size = params["gates"].shape[-1]
    a_of_one = sigmoid(-params["rate"])  # the paper's a = sigmoid(Lambda)
    for lane, x_TD in enumerate(x_BTD):
        u_TE = x_TD @ params["into"]["weight"].T
        u_TE = short_conv(u_TE, reset_BT[lane], params["conv"]["weight"]) + params["conv"]["bias"]
        h = np.zeros(u_TE.shape[1])
        for t, u in enumerate(u_TE):
            r, i = np.zeros_like(h), np.zeros_like(h)
            for head in range(config.heads):
                block = slice(head * size, (head + 1) * size)
                weight, bias = params["gates"][head], params["gates_bias"][head]
                r[block] = sigmoid(weight[:size] @ u[block] + bias[:size])
                i[block] = sigmoid(weight[size:] @ u[block] + bias[size:])
            a = a_of_one ** (8 * r)
            h = np.zeros_like(h) if reset_BT[lane, t] else h
            h = a * h + np.sqrt(1 - a**2) * i * u
            y = gelu(params["gate"]["weight"] @ x_TD[t]) * h
            out_BTD[lane, t] = params["out"]["weight"] @ y
    return out_BTD
