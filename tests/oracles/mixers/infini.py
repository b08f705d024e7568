"""arXiv:2404.07143, Eqs. 4-10, token by token; the memory is written after each whole segment."""

import numpy as np

from oracles.mixers.parts import rotate, sigmoid


def elu_plus_one(x):
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def read(memory_KV, sum_K, x_K):
    phi_K = elu_plus_one(x_K)
    return phi_K @ memory_KV / (phi_K @ sum_K) if sum_K.any() else np.zeros(memory_KV.shape[1])


def write(memories, sums, segment, update):
    """segment: (k_HK, v_HV) of its tokens."""
    before = memories.copy(), sums.copy()
    for k_HK, v_HV in segment:
        for h in range(len(k_HK)):
            new_V = v_HV[h]
            if update == "delta":
                new_V = new_V - read(before[0][h], before[1][h], k_HK[h])
            memories[h] += np.outer(elu_plus_one(k_HK[h]), new_V)
            sums[h] += elu_plus_one(k_HK[h])


def local(q_K, keys, values, h, config, size):
    place, scores = len(keys) - 1, []
    turn = config.position.kind == "rotary"
    base = config.position.base if turn else None
    for j, k_HK in enumerate(keys):
        q, k = q_K[None], k_HK[h][None]
        if turn:
            q, k = rotate(q, place, base), rotate(k, j, base)
        scores.append((q[0] @ k[0]) / np.sqrt(size))
        if config.position.kind == "alibi":  # two heads: slopes 1/16, 1/256
            scores[-1] -= 16.0 ** -(h + 1) * (place - j)
    weights = np.exp(np.array(scores) - max(scores))
    return weights @ np.array([v_HV[h] for v_HV in values]) / weights.sum()


def infini(params, config, x_BTD, reset_BT):
    heads = config.heads
    open_H = sigmoid(config.gate_rate * params["gate"])
    size = len(params["query"]["weight"]) // heads
    out_BTD = np.zeros_like(x_BTD)
    for lane, x_TD in enumerate(x_BTD):
        for t, x_D in enumerate(x_TD):
            if t == 0 or reset_BT[lane, t]:
                memories, sums, segment = np.zeros((heads, size, size)), np.zeros((heads, size)), []
            if len(segment) == config.segment:
                write(memories, sums, segment, config.update)
                segment = []
            q_HK, k_HK, v_HV = (
                (params[name]["weight"] @ x_D).reshape(heads, -1)
                for name in ("query", "key", "value")
            )
            segment.append((k_HK, v_HV))
            keys, values = zip(*segment)
            out = [
                open_H[h] * read(memories[h], sums[h], q_HK[h])
                + (1 - open_H[h]) * local(q_HK[h], keys, values, h, config, size)
                for h in range(heads)
            ]
            out_BTD[lane, t] = params["out"]["weight"] @ np.concatenate(out)
    return out_BTD
