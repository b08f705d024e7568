"""Pieces of layers in NumPy."""

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def rms_norm(x, weight, eps=1e-6):
    return weight * x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps)


def unit(x, eps=1e-6):
    return x / np.sqrt(np.sum(x * x, -1, keepdims=True) + eps)


def short_conv(x_TF, reset_T, weight_WF):
    """Taps reach back to the latest reset and no further."""
    out, start = np.zeros_like(x_TF), 0
    for t in range(len(x_TF)):
        start = t if reset_T[t] else start
        for lag in range(len(weight_WF)):
            if t - lag >= start:
                out[t] += weight_WF[lag] * x_TF[t - lag]
    return out


def rotate(x_HK, position, base):
    half = x_HK.shape[-1] // 2
    out = np.empty_like(x_HK)
    for i in range(half):
        angle = position * base ** (-2 * i / x_HK.shape[-1])
        a, b = x_HK[:, i], x_HK[:, i + half]
        out[:, i] = a * np.cos(angle) - b * np.sin(angle)
        out[:, i + half] = b * np.cos(angle) + a * np.sin(angle)
    return out
