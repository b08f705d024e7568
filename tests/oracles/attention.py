"""Softmax attention, one query at a time over a list of the keys that it sees."""

import numpy as np


def attention(q, k, v, slopes, scale, causal, window, positions, segments, cap=None, sinks=None):
    """positions: (queries [B, T], keys [B, J]); segments: the same, or None.

    cap: logits x become cap tanh(x / cap), before slopes lower them (arXiv:2408.00118, Sec. 2).
    sinks: a logit a head that is one more in the softmax, dropped before the values are summed.
    """
    batch, tokens, heads, _ = q.shape
    share = heads // k.shape[2]
    o = np.zeros((batch, tokens, heads, v.shape[-1]))
    for b, t, h in np.ndindex(batch, tokens, heads):
        weights, values = [], []
        for j in range(k.shape[1]):
            back = int(positions[0][b, t]) - int(positions[1][b, j])
            if causal and back < 0:
                continue
            if window is not None and back >= window:
                continue
            if segments is not None:
                own, other = segments[0][b, t], segments[1][b, j]
                if other < 0 or own != other:
                    continue
            score = scale * (q[b, t, h] @ k[b, j, h // share])
            if cap is not None:
                score = cap * np.tanh(score / cap)
            if slopes is not None:
                score -= slopes[h] * back
            weights.append(np.exp(score))
            values.append(v[b, j, h // share])
        if weights:
            more = 0.0 if sinks is None else np.exp(sinks[h])
            o[b, t, h] = np.array(weights) @ np.array(values) / (np.sum(weights) + more)
    return o
