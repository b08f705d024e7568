"""Test-time training (arXiv:2407.04620), one token of one head at a time, weights explicit."""

import numpy as np


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_slope(x):
    inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    slope = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)
    return 0.5 * (1 + np.tanh(inner)) + 0.5 * x * slope / np.cosh(inner) ** 2


def layer_norm(z, scale, shift):
    return (z - z.mean()) / np.sqrt(z.var() + 1e-6) * scale + shift


def layer_norm_jacobian(z, scale):
    """dLN_i / dz_j."""
    size, deviation = len(z), np.sqrt(z.var() + 1e-6)
    standard = (z - z.mean()) / deviation
    inner = np.eye(size) - 1 / size - np.outer(standard, standard) / size
    return scale[:, None] * inner / deviation


def read(weights, x):
    """x W + c, or gelu(x W + c) U + d."""
    z = x @ weights[0] + weights[1]
    return z if len(weights) == 2 else gelu(z) @ weights[2] + weights[3]


def gradients(weights, k, v, scale, shift):
    """Of 1/2 |k + LN(read(k)) - v|^2, one for each of `weights`."""
    z = read(weights, k)
    error = k + layer_norm(z, scale, shift) - v
    last = layer_norm_jacobian(z, scale).T @ error
    if len(weights) == 2:
        return [np.outer(k, last), last]
    before = k @ weights[0] + weights[1]
    first = (weights[2] @ last) * gelu_slope(before)
    return [np.outer(k, first), first, np.outer(gelu(before), last), last]


def ttt(q, k, v, rate, place_rate, memory, norm, reset):
    """o, and the weights of every lane before its unfinished block; lanes start a document."""
    batch, tokens, heads, _ = q.shape
    o = np.zeros(q.shape)
    last = [np.zeros((batch, *weight.shape)) for weight in memory]
    for b in range(batch):
        for h in range(heads):
            initial = [weight[h] for weight in memory]
            entered, place = initial, 0
            sums = [np.zeros_like(weight) for weight in initial]
            for t in range(tokens):
                if reset[b, t]:
                    entered, place = initial, 0
                if place == 0:
                    sums = [np.zeros_like(weight) for weight in initial]
                scale, shift = norm[0][h], norm[1][h]
                steps = gradients(entered, k[b, t, h], v[b, t, h], scale, shift)
                sums = [s + rate[b, t, h] * g for s, g in zip(sums, steps)]
                now = [w - place_rate[place] * s for w, s in zip(entered, sums)]
                o[b, t, h] = q[b, t, h] + layer_norm(read(now, q[b, t, h]), scale, shift)
                place += 1
                if place == len(place_rate):
                    entered, place = now, 0
            for lanes, weight in zip(last, entered):
                lanes[b, h] = weight
    return o, last
