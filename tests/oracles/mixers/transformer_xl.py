"""arXiv:1901.02860, Sec. 3.2 and 3.3, token by token over lists of inputs."""

import numpy as np


def sinusoid(distance, size):
    angles = [distance / 10000 ** (2 * i / size) for i in range(size // 2)]
    return np.array([np.sin(a) for a in angles] + [np.cos(a) for a in angles])


def relative_attention(p, config, x_D, context):
    """context: (input, distance) of what the token sees, itself included."""
    heads = config.heads
    maps = [p[name]["weight"] for name in ("query", "key", "value", "distance")]
    query, key, value, place = maps
    q_HK = (query @ x_D).reshape(heads, -1)
    u_HK, v_HK = (p[name].reshape(heads, -1) for name in ("content_bias", "distance_bias"))
    out = []
    for h in range(heads):
        scores, values = [], []
        for other_D, distance in context:
            k_K = (key @ other_D).reshape(heads, -1)[h]
            r_K = (place @ sinusoid(distance, len(x_D))).reshape(heads, -1)[h]
            content = (q_HK[h] + u_HK[h]) @ k_K
            scores.append((content + (q_HK[h] + v_HK[h]) @ r_K) / np.sqrt(len(k_K)))
            values.append((value @ other_D).reshape(heads, -1)[h])
        weights = np.exp(np.array(scores) - max(scores))
        out.append(weights @ np.array(values) / weights.sum())
    return np.concatenate(out)


def transformer_xl(params, config, x_BTD, reset_BT):
    out_BTD = np.zeros_like(x_BTD)
    for lane, x_TD in enumerate(x_BTD):
        memory, current = [], []
        for t, x_D in enumerate(x_TD):
            if reset_BT[lane, t]:
                memory, current = [], []
            if len(current) == config.segment:
                memory = ([*memory, *current] if config.memory else [])[-config.memory :]
                current = []
            current.append(x_D)
            seen = [*memory, *current]
            limit = np.inf if config.clamp is None else config.clamp
            context = [(x, min(len(seen) - 1 - j, limit)) for j, x in enumerate(seen)]
            o_D = relative_attention(params["attention"], config, x_D, context)
            out_BTD[lane, t] = params["out"]["weight"] @ o_D
    return out_BTD
