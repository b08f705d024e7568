"""arXiv:2406.06484, in the form S = S (I - beta k k^T) + beta v k^T."""

import numpy as np

from oracles.mixers.parts import rms_norm, short_conv, sigmoid, silu, unit


def deltanet(params, config, x_BTD, reset_BT):
    out_BTD = np.zeros_like(x_BTD)
    for lane, x_TD in enumerate(x_BTD):
        streams = []
        for name in ("query", "key", "value"):
            stream_TF = x_TD @ params[name]["project"]["weight"].T
            if config.conv:
                weight = params[name]["conv"]["weight"]
                stream_TF = short_conv(stream_TF, reset_BT[lane], weight)
            streams.append(silu(stream_TF).reshape(len(x_TD), config.heads, -1))
        q_THK, k_THK, v_THV = unit(streams[0]), unit(streams[1]), streams[2]
        size = q_THK.shape[-1]
        for h in range(config.heads):
            S_VK = np.zeros((v_THV.shape[-1], size))
            for t, x_D in enumerate(x_TD):
                if reset_BT[lane, t]:
                    S_VK = np.zeros_like(S_VK)
                beta = sigmoid(params["beta"]["weight"][h] @ x_D)
                beta = 2 * beta if config.negative_eigenvalues else beta
                k_K, v_V = k_THK[t, h], v_THV[t, h]
                S_VK = S_VK @ (np.eye(size) - beta * np.outer(k_K, k_K)) + beta * np.outer(v_V, k_K)
                o_V = S_VK @ q_THK[t, h] / np.sqrt(size)
                out_V = rms_norm(o_V, params["readout"]["norm"]["weight"])
                rows = slice(h * len(o_V), (h + 1) * len(o_V))
                out_BTD[lane, t] += params["readout"]["out"]["weight"][:, rows] @ out_V
    return out_BTD
