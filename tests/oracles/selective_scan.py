"""The selective scan of arXiv:2312.00752, one token of one channel at a time."""

import numpy as np


def selective_scan(x, dt, A, B, C, D, state, reset):
    """Abar = exp(dt A), Bbar = dt B;  h = Abar h + Bbar x;  y = C h + D x. Returns y, h."""
    y, last = np.zeros(x.shape), np.zeros(state.shape)
    for b in range(x.shape[0]):
        for e in range(x.shape[2]):
            h = state[b, e].astype(np.float64)
            for t in range(x.shape[1]):
                if reset is not None and reset[b, t]:
                    h = np.zeros_like(h)
                step = dt[b, t, e]
                h = np.exp(step * A[e]) * h + step * B[b, t] * x[b, t, e]
                y[b, t, e] = C[b, t] @ h + (0 if D is None else D[e] * x[b, t, e])
            last[b, e] = h
    return y, last
