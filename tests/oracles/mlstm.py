"""arXiv:2405.04517, Eqs. 19 to 27, without the stabiliser: float64 holds exp(600)."""

import numpy as np


def mlstm(q, k, v, log_input, log_forget, state, reset, scale):
    """Returns h, and C and n as they are. `state` is C, n and m of a stabilised state."""
    batch, tokens, heads, _ = q.shape
    memory, normaliser, level = (np.asarray(x, np.float64) for x in state)
    C_last = np.exp(level)[..., None, None] * memory
    n_last = np.exp(level)[..., None] * normaliser
    h = np.zeros(v.shape)
    for b in range(batch):
        for head in range(heads):
            C, n = C_last[b, head], n_last[b, head]
            for t in range(tokens):
                if reset is not None and reset[b, t]:
                    C, n = 0 * C, 0 * n
                f, i = np.exp(log_forget[b, t, head]), np.exp(log_input[b, t, head])
                C = f * C + i * np.outer(k[b, t, head], v[b, t, head])
                n = f * n + i * k[b, t, head]
                query = scale * q[b, t, head]
                h[b, t, head] = query @ C / max(abs(query @ n), 1)
            C_last[b, head], n_last[b, head] = C, n
    return h, C_last, n_last
