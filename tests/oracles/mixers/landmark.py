"""arXiv:2305.16300, Sec. 3, token by token over a list of blocks."""

import numpy as np

from oracles.mixers.parts import rotate


def weights_of(scores):
    weights = np.exp(np.array(scores) - max(scores))
    return weights / weights.sum()


def landmark(params, config, x_BTD, reset_BT):
    heads = config.heads
    out_BTD = np.zeros_like(x_BTD)
    for lane, x_TD in enumerate(x_BTD):
        for t, x_D in enumerate(x_TD):
            if t == 0 or reset_BT[lane, t]:
                past, current = [], []
            if len(current) == config.block + 1:
                past, current = [*past, current][-config.blocks :], []
            q_HK, k_HK, v_HV = (
                (params[name]["weight"] @ x_D).reshape(heads, -1)
                for name in ("query", "key", "value")
            )
            current.append((k_HK, v_HV))
            is_landmark = len(current) == config.block + 1
            own = current[:-1] if is_landmark else current
            heads_out = [head(h, q_HK, past, own, len(current) - 1, config) for h in range(heads)]
            out_BTD[lane, t] = params["out"]["weight"] @ np.concatenate(heads_out)
    return out_BTD


def head(h, q_HK, past, own, place, config):
    size = q_HK.shape[-1]

    def score(k_HK, distance):
        q = q_HK[h][None]
        if config.position.kind == "rotary":
            q = rotate(q, distance, config.position.base)
        plain = q[0] @ k_HK[h] / np.sqrt(size)
        # two heads: slopes 1/16, 1/256
        return plain - (16.0 ** -(h + 1) * distance if config.position.kind == "alibi" else 0)

    blocks = []  # score of the landmark, and what reading the block gives
    for i, block in enumerate(past):
        back = len(past) - i
        if config.retrieve is not None:
            back = min(back, config.retrieve + 1)
        start = -back * (config.block + 1)
        scores = [score(k, place - (start + j)) for j, (k, _) in enumerate(block)]
        values = np.array([v[h] for _, v in block[:-1]])
        blocks.append((scores[-1], weights_of(scores[:-1]) @ values))
    if config.retrieve is not None:
        blocks = sorted(blocks, key=lambda block: block[0])[-config.retrieve :]
    scores = [score(k, place - j) for j, (k, _) in enumerate(own)]
    values = [v[h] for _, v in own]
    main = weights_of(scores + [s for s, _ in blocks])
    return main @ np.array(values + [read for _, read in blocks])
