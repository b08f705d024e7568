"""arXiv:1907.01470, Sec. 4: one softmax over the context and over persistent vectors."""

import numpy as np

from oracles.mixers.parts import rotate


def all_attention(params, config, x_BTD, reset_BT):
    out_BTD = np.zeros_like(x_BTD)
    heads, reach = config.heads, config.window or config.context
    size = len(params["query"]["weight"]) // heads
    m_NHK = np.sqrt(size) * params["persistent_keys"].reshape(-1, heads, size)
    u_NHK = np.sqrt(config.slots) * params["persistent_values"].reshape(-1, heads, size)
    base = getattr(config.position, "base", None)
    for lane, x_TD in enumerate(x_BTD):
        start, cache = 0, []
        for t, x_D in enumerate(x_TD):
            if reset_BT[lane, t]:
                start, cache = t, []
            q_HK, k_HK, v_HK = (
                (params[name]["weight"] @ x_D).reshape(heads, size)
                for name in ("query", "key", "value")
            )
            turn = (lambda a, p=t - start: rotate(a, p, base)) if base else (lambda a: a)
            cache = (cache + [(turn(k_HK), v_HK)])[-reach:]
            o_HK = np.zeros((heads, size))
            for h in range(heads):
                scores = [turn(q_HK)[h] @ k[h] for k, _ in cache]
                scores = np.array(scores + [q_HK[h] @ m for m in m_NHK[:, h]]) / np.sqrt(size)
                weights = np.exp(scores - scores.max())
                values = [v[h] for _, v in cache] + list(u_NHK[:, h])
                o_HK[h] = weights @ np.array(values) / weights.sum()
            out_BTD[lane, t] = params["out"]["weight"] @ o_HK.ravel()
    return out_BTD
