"""arXiv:2504.13173, Sec. 3-5, one token of one head at a time, gradients by hand.

A memory is a dict: `structure`, `bias`, `retention`, `learner` name the choices, the rest are their
numbers. Gradients of a block are at the weights that it starts with.
"""

import numpy as np

from oracles.neural_memory import gelu, gelu_slope


def hebb(e, v, threshold, memory):
    return -v


def squares(e, v, threshold, memory):
    return e


def powers(e, v, threshold, memory):
    return np.tanh(10 * e) * np.sqrt(e * e + 1e-6) ** (memory["bias_power"] - 1)


def huber(e, v, threshold, memory):
    length = np.linalg.norm(e)
    return e if length <= threshold else threshold * e / length


def robust(e, v, threshold, memory):
    return e + threshold * e / np.sqrt(e @ e + 1e-6)


BIASES = {"l2": squares, "dot_product": hebb, "lp": powers, "huber": huber, "robust": robust}


def soft_threshold(A, memory):
    return np.sign(A) * np.maximum(np.abs(A) - memory["cut"], 0)


def normalised(A, memory):
    q = memory["retention_power"]
    scale = np.sqrt(len(A))
    size = (np.mean(np.abs(A) ** q) + (memory["floor"] / scale) ** q) ** (1 / q)
    return A / (size * scale) ** (q - 2)


def mirrored(A, memory):
    s = memory["retention_power"]
    return np.sign(A) * np.abs(A) ** (s - 1) / np.mean(np.abs(A) ** s) ** ((s - 2) / s)


def softmax(A, memory):
    c = memory["total"] * np.sqrt(len(A))
    columns = np.exp(A * len(A) / c)
    return c * columns / columns.sum(0)


RETENTIONS = {
    "weight_decay": lambda A, memory: A,
    "none": lambda A, memory: A,
    "elastic_net": soft_threshold,
    "lq": normalised,
    "mirror": mirrored,
    "kl": softmax,
}


def answer(memory, W, x):
    """The answer, what a backward pass needs, and what LayerNorm is given."""
    if memory["structure"] == "gated_mlp":
        a, b = x @ W[0], x @ W[1]
        inputs = [x, x, gelu(a) * b]
        y = inputs[2] @ W[2]
        inside = (a, b)
    else:
        inputs, inside, y = [x], [], x @ W[0]
        for w in W[1:]:
            inside.append(y)
            inputs.append(gelu(y))
            y = inputs[-1] @ w
    if memory.get("norm") is None:
        return y, inputs, inside, y
    scale, shift, eps = memory["norm"]
    hat = (y - y.mean()) / np.sqrt(y.var() + eps)
    return x + scale * hat + shift, inputs, inside, y


def gradients(memory, W, k, v, threshold):
    y, inputs, inside, last = answer(memory, W, k)
    d = BIASES[memory["bias"]](y - v, v, threshold, memory)
    if memory.get("norm") is not None:
        scale, _, eps = memory["norm"]
        sigma = np.sqrt(last.var() + eps)
        hat, g = (last - last.mean()) / sigma, d * scale
        d = (g - g.mean() - hat * (g * hat).mean()) / sigma
    if memory["structure"] == "gated_mlp":
        a, b = inside
        back = W[2] @ d
        by_output = [back * b * gelu_slope(a), back * gelu(a), d]
    else:
        by_output = [d]
        for w, before in zip(W[:0:-1], inside[::-1]):
            by_output.insert(0, (w @ by_output[0]) * gelu_slope(before))
    return [np.outer(x, d) for x, d in zip(inputs, by_output)]


def miras(memory, q, k, v, rate, keep, momentum, threshold, start, update_every, reset):
    """One lane and head: [T, K], [T, V], [T]; momentum, threshold None for none; start: A at the
    start of a document. Returns o, and A, S at the start of the unfinished block."""

    def weights(A):
        return [RETENTIONS[memory["retention"]](a, memory) for a in A]

    first, zeros = [np.array(a) for a in start], [np.zeros_like(a) for a in start]
    o = np.zeros(v.shape)
    A, S, count = first, zeros, 0
    for t in range(len(q)):
        if t == 0 or reset[t]:
            A, S, count = first, zeros, 0
        if count == 0:
            A0, S0, W0 = A, S, weights(A)
            W = W0
        u = gradients(memory, W0, k[t], v[t], None if threshold is None else threshold[t])
        eta = 0.0 if momentum is None else momentum[t]
        S = [eta * s - rate[t] * g for s, g in zip(S, u)]
        step = S
        if memory["learner"] == "nesterov":
            step = [eta * s - rate[t] * g for s, g in zip(S, u)]
        A = [keep[t] * a + s for a, s in zip(A, step)]
        W = [keep[t] * w + s for w, s in zip(W, step)]
        o[t] = answer(memory, W, q[t])[0]
        count = (count + 1) % update_every
    return (o, A, S) if count == 0 else (o, A0, S0)
