"""arXiv:2312.00752, Algorithm 2 and Figure 3, one token at a time."""

import numpy as np

from oracles.mixers.parts import short_conv, silu


def mamba(params, config, x_BTD, reset_BT):
    out_BTD = np.zeros_like(x_BTD)
    W_dt, states = params["step"], config.states
    channels, rank = W_dt.shape
    A = -np.exp(params["log_rate"]).reshape(channels, states)
    for lane, x_TD in enumerate(x_BTD):
        u_TE = x_TD @ params["into"]["weight"][0].T
        u_TE = short_conv(u_TE, reset_BT[lane], params["conv"]["weight"])
        u_TE = silu(u_TE + params["conv"]["bias"])
        h = np.zeros((channels, states))
        for t, u in enumerate(u_TE):
            if reset_BT[lane, t]:
                h = np.zeros_like(h)
            low = params["select"]["weight"][:rank] @ u
            B = params["select"]["weight"][rank : rank + states] @ u
            C = params["select"]["weight"][rank + states :] @ u
            dt = np.log1p(np.exp(W_dt @ low + params["step_bias"]))
            for e in range(channels):
                h[e] = np.exp(dt[e] * A[e]) * h[e] + dt[e] * B * u[e]
            y = h @ C + params["skip"] * u
            z = params["into"]["weight"][1] @ x_TD[t]
            out_BTD[lane, t] = params["out"]["weight"] @ (y * silu(z))
    return out_BTD
