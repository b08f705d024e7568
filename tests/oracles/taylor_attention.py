"""Attention with the weights 1 + s + s^2 / 2, every pair of tokens of a document."""

import itertools

import numpy as np


def taylor_attention(q, k, v, reset, scale):
    """o_t = sum_j w_tj v_j / sum_j w_tj over the j <= t since the latest reset. Returns o."""
    batch, tokens, heads, _ = q.shape
    o = np.zeros(v.shape)
    for b, h in itertools.product(range(batch), range(heads)):
        start = 0
        for t in range(tokens):
            start = t if reset[b, t] else start
            s = scale * k[b, start : t + 1, h] @ q[b, t, h]
            w = 1 + s + s**2 / 2
            o[b, t, h] = w @ v[b, start : t + 1, h] / w.sum()
    return o


def memory(k, v):
    """Sums over all tokens of [1, k_i, k_i k_j (i < j) or k_i^2 / sqrt(2)] times [v, 1]."""
    pairs = itertools.combinations_with_replacement(range(k.shape[-1]), 2)
    squares = [k[..., i] * k[..., j] * (0.5**0.5 if i == j else 1.0) for i, j in pairs]
    features = np.concatenate([np.ones_like(k[..., :1]), k, np.stack(squares, -1)], -1)
    values = np.concatenate([v, np.ones_like(v[..., :1])], -1)
    return np.einsum("bthm,bthw->bhmw", features, values)
