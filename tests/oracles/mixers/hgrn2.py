"""arXiv:2404.07904, Eqs. 4 to 6."""

import numpy as np

from oracles.mixers.parts import rms_norm, sigmoid, silu


def hgrn2(params, config, x_BTD, reset_BT):
    size = min(config.expand, x_BTD.shape[-1])
    bound = sigmoid(params["lower"])
    out_BTD = np.zeros_like(x_BTD)
    for lane, x_TD in enumerate(x_BTD):
        memory_HKV = 0.0
        for t, x_D in enumerate(x_TD):
            gate = sigmoid(params["forget"]["weight"] @ x_D)
            f_HK = (bound + (1 - bound) * gate).reshape(-1, size)
            o_HK = silu(params["query"]["weight"] @ x_D).reshape(-1, size)
            i_HV = (params["value"]["weight"] @ x_D).reshape(-1, size)
            if reset_BT[lane, t]:
                memory_HKV = 0.0
            written_HKV = (1 - f_HK)[:, :, None] * i_HV[:, None, :]
            memory_HKV = f_HK[:, :, None] * memory_HKV + written_HKV
            y_HV = np.einsum("hk,hkv->hv", o_HK, memory_HKV)
            y_D = rms_norm(y_HV.ravel(), params["norm"]["weight"])
            out_BTD[lane, t] = params["out"]["weight"] @ y_D
    return out_BTD
