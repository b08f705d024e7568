"""arXiv:2203.08913, Sec. 3.1 and 3.2, token by token, with a sorted list for a search."""

import numpy as np

from oracles.mixers.parts import rotate, sigmoid, unit


def softmax_sum(scores, values):
    weights = np.exp(np.array(scores) - max(scores))
    return weights @ np.array(values) / weights.sum()


def local(q_K, keys, values, h, config, scale):
    """keys, values: of the cache and the segment, the query's own last."""
    scores = []
    for j, k_HK in enumerate(keys):
        back = len(keys) - 1 - j
        q, k = q_K[None], k_HK[h][None]
        if config.position.kind == "rotary":
            q = rotate(q, back, config.position.base)
        scores.append(scale * (q[0] @ k[0]))
        if config.position.kind == "alibi":  # two heads: slopes 1/16, 1/256
            scores[-1] -= 16.0 ** -(h + 1) * back
    return softmax_sum(scores, [v_HV[h] for v_HV in values])


def recalled(q_K, memory, h, config, scale):
    scored = sorted(((scale * (q_K @ k[h]), i) for i, (k, _) in enumerate(memory)), reverse=True)
    best = scored[: config.neighbours]
    if not best:
        return np.zeros_like(q_K)
    return softmax_sum([score for score, _ in best], [memory[i][1][h] for _, i in best])


def memorizing(params, config, x_BTD, reset_BT):
    heads = config.heads
    open_H = sigmoid(params["gate"])
    out_BTD = np.zeros_like(x_BTD)
    for lane, x_TD in enumerate(x_BTD):
        for t, x_D in enumerate(x_TD):
            if t == 0 or reset_BT[lane, t]:
                past, segment = [], []
            if len(segment) == config.segment:
                past, segment = past + segment, []
            q_HK, k_HK, v_HV = (
                (params[name]["weight"] @ x_D).reshape(heads, -1)
                for name in ("query", "key", "value")
            )
            q_HK, k_HK = unit(q_HK), unit(k_HK)
            segment.append((k_HK, v_HV))
            cached = past[-config.cache :] if config.cache else []
            keys, values = zip(*cached, *segment)
            scale_H = np.sqrt(q_HK.shape[-1]) * np.abs(params["scale"])
            out = [
                open_H[h] * recalled(q_HK[h], past[-config.memory :], h, config, scale_H[h])
                + (1 - open_H[h]) * local(q_HK[h], keys, values, h, config, scale_H[h])
                for h in range(heads)
            ]
            out_BTD[lane, t] = params["out"]["weight"] @ np.concatenate(out)
    return out_BTD
