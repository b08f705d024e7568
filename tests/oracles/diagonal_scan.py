"""A leaky sum in every channel, one token at a time."""

import numpy as np


def diagonal_scan(x, log_decay, state, reset):
    """h = exp(g) h + x;  h = 0 first where reset. Returns all h, and the last."""
    out, last = np.zeros(x.shape), np.zeros(state.shape)
    for b in range(len(x)):
        h = state[b].astype(np.float64)
        for t in range(x.shape[1]):
            h = np.zeros_like(h) if reset is not None and reset[b, t] else h
            h = np.exp(log_decay[b, t]) * h + x[b, t]
            out[b, t] = h
        last[b] = h
    return out, last
