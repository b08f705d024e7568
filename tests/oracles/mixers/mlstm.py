"""arXiv:2405.04517, Eqs. 19 to 27 without the stabiliser, in the block of Fig. 11."""

import numpy as np

from oracles.mixers.parts import short_conv, sigmoid, silu


def dense(weight_HFEJ):
    """The block-diagonal maps as matrices: channels j, J + j, 2 J + j, ... of a head mix."""
    heads, block, _, apart = weight_HFEJ.shape
    matrix = np.zeros((heads, block * apart, block * apart))
    for j in range(apart):
        matrix[:, j::apart, j::apart] = weight_HFEJ[..., j]
    return matrix


def mlstm(params, config, x_BTD, reset_BT):
    H, inner = config.heads, params["skip"].size
    K = inner // H
    out_BTD = np.zeros_like(x_BTD)
    maps = {name: dense(params[name]["weight"]) for name in ("query", "key", "value")}
    for lane, x_TD in enumerate(x_BTD):
        u, z = (x_TD @ weight.T for weight in params["up"]["weight"])
        conv = short_conv(u, reset_BT[lane], params["conv"]["weight"]) + params["conv"]["bias"]
        c = silu(conv)
        C, n = np.zeros((H, K, K)), np.zeros((H, K))
        for t in range(len(x_TD)):
            q, k, v = (
                np.einsum("hkl,hl->hk", maps[name], source[t].reshape(H, K))
                for name, source in (("query", c), ("key", c), ("value", u))
            )
            qkv = np.concatenate([q.ravel(), k.ravel(), v.ravel()])
            gates = params["gate_weight"] @ qkv + params["gate_bias"]
            i, f = np.exp(gates[:H]), sigmoid(gates[H:])
            if reset_BT[lane, t]:
                C, n = np.zeros_like(C), np.zeros_like(n)
            k = k / np.sqrt(K)
            C = f[:, None, None] * C + i[:, None, None] * v[:, :, None] * k[:, None, :]
            n = f[:, None] * n + i[:, None] * k
            divisor = np.maximum(np.abs(np.einsum("hk,hk->h", n, q)), 1)
            h = np.einsum("hvk,hk->hv", C, q) / divisor[:, None]
            h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)
            h = h.ravel() * params["norm"] + params["skip"] * c[t]
            out_BTD[lane, t] = params["down"]["weight"] @ (h * silu(z[t]))
    return out_BTD
