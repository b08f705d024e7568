"""Hochreiter and Schmidhuber 1997."""

import numpy as np

from oracles.mixers.parts import sigmoid


def lstm(params, config, x_BTD, reset_BT):
    out_BTD = np.zeros_like(x_BTD)
    width = x_BTD.shape[-1]
    for lane, x_TD in enumerate(x_BTD):
        cell, hidden = np.zeros(width), np.zeros(width)
        for t, x_D in enumerate(x_TD):
            if reset_BT[lane, t]:
                cell, hidden = np.zeros(width), np.zeros(width)
            gates = params["into"]["weight"] @ x_D + params["bias"]
            i, f, g, o = np.split(gates + params["recurrent"] @ hidden, 4)
            cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
            hidden = sigmoid(o) * np.tanh(cell)
            out_BTD[lane, t] = params["out"]["weight"] @ hidden
    return out_BTD
