"""The gated short convolution of arXiv:2402.18668."""

import numpy as np

from oracles.mixers.parts import short_conv, silu


def base_conv(params, config, x_BTD, reset_BT):
    out_BTD = np.zeros_like(x_BTD)
    for lane, x_TD in enumerate(x_BTD):
        u_TF, gate_TF = (
            x_TD @ weight.T + bias
            for weight, bias in zip(params["into"]["weight"], params["into"]["bias"])
        )
        u_TF = short_conv(u_TF, reset_BT[lane], params["conv"]["weight"]) + params["conv"]["bias"]
        inner_TF = silu(u_TF) * gate_TF
        out_BTD[lane] = inner_TF @ params["out"]["weight"].T + params["out"]["bias"]
    return out_BTD
