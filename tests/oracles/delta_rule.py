"""The gated delta rule, one token of one head at a time."""

import numpy as np


def delta_rule(q, k, v, beta, log_decay, state, reset, scale):
    """S = exp(g) S;  S = (I - beta k k^T) S + beta k v^T;  o = scale S^T q. Returns o, S."""
    batch, tokens, heads, size = q.shape
    o = np.zeros(v.shape)
    last = np.zeros(state.shape)
    for b in range(batch):
        for h in range(heads):
            S = state[b, h].astype(np.float64)
            for t in range(tokens):
                if reset is not None and reset[b, t]:
                    S = np.zeros_like(S)
                if log_decay is not None:
                    S = np.diag(np.exp(np.broadcast_to(log_decay[b, t, h], size))) @ S
                key, strength = k[b, t, h], beta[b, t, h]
                S = (np.eye(size) - strength * np.outer(key, key)) @ S
                S = S + strength * np.outer(key, v[b, t, h])
                o[b, t, h] = scale * (q[b, t, h] @ S)
            last[b, h] = S
    return o, last
