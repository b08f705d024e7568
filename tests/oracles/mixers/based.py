"""arXiv:2402.18668: every pair of tokens of a document, weighted by the series of exp."""

import numpy as np


def based(params, config, x_BTD, reset_BT):
    out_BTD = np.zeros_like(x_BTD)
    for lane, x_TD in enumerate(x_BTD):
        document = []
        for t, x_D in enumerate(x_TD):
            if reset_BT[lane, t]:
                document = []
            q_HK, k_HK, v_HV = (
                (params[name]["weight"] @ x_D).reshape(config.heads, -1)
                for name in ("query", "key", "value")
            )
            document.append((k_HK, v_HV))
            o_HV = np.zeros_like(v_HV)
            for h in range(config.heads):
                score = np.array([q_HK[h] @ k[h] for k, _ in document]) / np.sqrt(q_HK.shape[-1])
                weights = 1 + score + score**2 / 2
                values = np.array([v[h] for _, v in document])
                o_HV[h] = weights @ values / weights.sum()
            out_BTD[lane, t] = params["out"]["weight"] @ o_HV.ravel()
    return out_BTD
