"""Gated linear attention, one token of one head at a time."""

import numpy as np


def linear_attention(q, k, v, log_decay, state, reset, scale):
    """S = diag(exp g) S + k v^T;  o = scale S^T q;  S = 0 first where reset. Returns o, S."""
    batch, tokens, heads, _ = q.shape
    o = np.zeros(v.shape)
    last = np.zeros(state.shape)
    for b in range(batch):
        for h in range(heads):
            S = state[b, h].astype(np.float64)
            for t in range(tokens):
                if reset is not None and reset[b, t]:
                    S = np.zeros_like(S)
                if log_decay is not None:
                    S = np.exp(np.broadcast_to(log_decay[b, t, h], len(S)))[:, None] * S
                S = S + np.outer(k[b, t, h], v[b, t, h])
                o[b, t, h] = scale * (q[b, t, h] @ S)
            last[b, h] = S
    return o, last
