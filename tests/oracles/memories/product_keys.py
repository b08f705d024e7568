"""arXiv:1907.05242, Sec. 3, and arXiv:2412.09764, Sec. 3: every pair of half keys, one by one."""

import numpy as np

from oracles.mixers.parts import rms_norm, silu


def product_keys(params, shared, config, x_BTD, reset_BT):
    return _tokens(lambda x: _read(params["search"], params["table"], config, x), x_BTD)


def memory_plus(params, shared, config, x_BTD, reset_BT):
    def token(x_D):
        m_V = _read(params["search"], shared["values"], config, x_D)
        return params["out"]["weight"] @ (m_V * silu(params["gate"]["weight"] @ x_D))

    return _tokens(token, x_BTD)


def _tokens(token, x_BTD):
    return np.stack([[token(x_D) for x_D in x_TD] for x_TD in x_BTD])


def _read(search, table_NV, config, x_D):
    count, out_V = config.keys, np.zeros(table_NV.shape[1])
    q_HPK = (search["query"]["weight"] @ x_D).reshape(config.heads, 2, -1)
    q_HPK = rms_norm(q_HPK, search["query_norm"]["weight"])
    k_HPNK, scale = search["keys"], 1.0
    if "key_norm" in search:
        k_HPNK = rms_norm(k_HPNK, search["key_norm"]["weight"])
        scale = config.query_size**-0.5
    for h in range(config.heads):
        scores = {}
        for i in range(count):
            for j in range(count):
                first, second = q_HPK[h, 0] @ k_HPNK[h, 0, i], q_HPK[h, 1] @ k_HPNK[h, 1, j]
                scores[i * count + j] = scale * (first + second)
        best = sorted(scores, key=scores.get)[-config.top_k :]
        weights = np.exp([scores[row] for row in best])
        out_V += (weights / weights.sum()) @ table_NV[best]
    return out_V
