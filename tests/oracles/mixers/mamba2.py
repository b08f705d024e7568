"""arXiv:2405.21060, Sec. 7: the recurrence of each head, one token at a time."""

import numpy as np

from oracles.mixers.parts import short_conv, silu


def mamba2(params, config, x_BTD, reset_BT):
    inner, N = params["norm"].size, config.state_size
    heads, groups = params["skip"].size, config.groups
    P = inner // heads
    A, D = -np.exp(params["log_rate"]), params["skip"]
    out_BTD = np.zeros_like(x_BTD)
    for lane, u_TD in enumerate(x_BTD):
        zxbcdt = u_TD @ params["into"]["weight"].T
        z, xbc, dt = zxbcdt[:, :inner], zxbcdt[:, inner:-heads], zxbcdt[:, -heads:]
        xbc = short_conv(xbc, reset_BT[lane], params["conv"]["weight"]) + params["conv"]["bias"]
        xbc, delta = silu(xbc), np.log1p(np.exp(dt + params["step_bias"]))
        h = np.zeros((heads, P, N))
        for t in range(len(u_TD)):
            if reset_BT[lane, t]:
                h = np.zeros_like(h)
            y = np.zeros((heads, P))
            for head in range(heads):
                group = head * groups // heads
                x = xbc[t, head * P : (head + 1) * P]
                B = xbc[t, inner + group * N :][:N]
                C = xbc[t, inner + (groups + group) * N :][:N]
                step = delta[t, head]
                h[head] = np.exp(step * A[head]) * h[head] + step * np.outer(x, B)
                y[head] = h[head] @ C + D[head] * x
            gated = (y.ravel() * silu(z[t])).reshape(groups, -1)
            gated = gated / np.sqrt(np.mean(gated**2, -1, keepdims=True) + 1e-5)
            out_BTD[lane, t] = params["out"]["weight"] @ (gated.ravel() * params["norm"])
    return out_BTD
