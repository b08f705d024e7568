"""arXiv:2501.00663, Eqs. 8-18, one token of one head at a time, gradients by hand.

Gradients of a block are at the weights it starts with; the error is |answer - value|^2 / 2.
"""

import numpy as np


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_slope(x):
    t = np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * np.sqrt(2 / np.pi) * (1 + 0.134145 * x * x)


def answer(weights, x, norm):
    """The answer, the input of every layer, what the last layer gave. norm: scale, shift, eps."""
    inputs, y = [], x
    for i, w in enumerate(weights):
        inputs.append(y if i == 0 else gelu(y))
        y = inputs[-1] @ w
    if norm is None:
        return y, inputs, y
    hat = (y - y.mean()) / np.sqrt(y.var() + norm[2])
    return x + norm[0] * hat + norm[1], inputs, y


def gradients(weights, k, v, norm):
    """d |answer - v|^2 / 2 in every weight matrix."""
    y, inputs, last = answer(weights, k, norm)
    d = y - v
    if norm is not None:
        sigma = np.sqrt(last.var() + norm[2])
        hat = (last - last.mean()) / sigma
        g = d * norm[0]
        d = (g - g.mean() - hat * (g * hat).mean()) / sigma
    out = [None] * len(weights)
    for i in reversed(range(len(weights))):
        out[i] = np.outer(inputs[i], d)
        if i > 0:
            before = inputs[i - 1] @ weights[i - 1]
            d = (weights[i] @ d) * gelu_slope(before)
    return out


def neural_memory(q, k, v, rate, keep, momentum, weights, norm, update_every, reset):
    """One lane and head: [T, K], [T, V], [T]; momentum None for none. Returns o, and W, S at the
    start of the block that is unfinished, and how many tokens it has."""
    first = [np.array(w, np.float64) for w in weights]
    zeros = [np.zeros_like(w) for w in first]
    W, S, W0, S0, count = first, zeros, first, zeros, 0
    o = np.zeros(v.shape)
    for t in range(len(q)):
        if reset[t]:
            W, S, W0, S0, count = first, zeros, first, zeros, 0
        u = gradients(W0, k[t], v[t], norm)
        eta = 0.0 if momentum is None else momentum[t]
        S = [eta * s - rate[t] * g for s, g in zip(S, u)]
        W = [keep[t] * w + s for w, s in zip(W, S)]
        o[t] = answer(W, q[t], norm)[0]
        count += 1
        if count == update_every:
            W0, S0, count = W, S, 0
    return o, W0, S0, count
