"""arXiv:1706.03762, token by token, with a bounded list of keys."""

import numpy as np

from oracles.mixers.parts import rotate


def attention(params, config, x_BTD, reset_BT):
    reach = config.window or config.context
    groups = config.kv_heads or config.heads
    out_BTD = np.zeros_like(x_BTD)
    for lane, x_TD in enumerate(x_BTD):
        keys, values, position = [], [], 0
        for t, x_D in enumerate(x_TD):
            if reset_BT[lane, t]:
                keys, values, position = [], [], 0
            q_HK = (params["query"]["weight"] @ x_D).reshape(config.heads, -1)
            k_GK = (params["key"]["weight"] @ x_D).reshape(groups, -1)
            v_GK = (params["value"]["weight"] @ x_D).reshape(groups, -1)
            if config.position.kind == "rotary":
                q_HK = rotate(q_HK, position, config.position.base)
                k_GK = rotate(k_GK, position, config.position.base)
            keys, values = [*keys, k_GK][-reach:], [*values, v_GK][-reach:]
            heads = []
            for h in range(config.heads):
                g = h * groups // config.heads
                scores = np.array([k[g] @ q_HK[h] for k in keys]) / np.sqrt(q_HK.shape[-1])
                if config.logit_cap is not None:
                    scores = config.logit_cap * np.tanh(scores / config.logit_cap)
                if config.position.kind == "alibi":  # four heads: slopes 1/4, 1/16, 1/64, 1/256
                    scores -= 4.0 ** -(h + 1) * np.arange(len(keys))[::-1]
                if config.sinks:  # one more logit, whose weight is dropped behind the softmax
                    scores = np.append(scores, params["sinks"][h])
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                heads.append(sum(w * v[g] for w, v in zip(weights[: len(values)], values)))
            out_BTD[lane, t] = params["out"]["weight"] @ np.concatenate(heads)
            position += 1
    return out_BTD
