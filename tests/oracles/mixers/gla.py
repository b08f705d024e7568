"""arXiv:2312.06635, Eq. 3 and Sec. 4.4."""

import numpy as np

from oracles.mixers.parts import rms_norm, sigmoid, silu


def gla(params, config, x_BTD, reset_BT):
    out_BTD = np.zeros_like(x_BTD)
    for lane, x_TD in enumerate(x_BTD):
        memory_HKV = 0.0
        for t, x_D in enumerate(x_TD):
            q_HK, k_HK, v_HV = (
                (params[name]["weight"] @ x_D).reshape(config.heads, -1)
                for name in ("query", "key", "value")
            )
            low = params["decay_into"]["weight"] @ x_D
            score = params["decay"]["weight"] @ low + params["decay"]["bias"]
            decay_HK = (sigmoid(score) ** (1 / 16)).reshape(config.heads, -1)
            if reset_BT[lane, t]:
                memory_HKV = 0.0
            memory_HKV = decay_HK[:, :, None] * memory_HKV + k_HK[:, :, None] * v_HV[:, None, :]
            o_HV = np.einsum("hk,hkv->hv", q_HK, memory_HKV) / np.sqrt(q_HK.shape[-1])
            readout = params["readout"]
            gate_HV = silu(readout["gate"]["weight"] @ x_D).reshape(config.heads, -1)
            y_HV = rms_norm(o_HV, readout["norm"]["weight"]) * gate_HV
            out_BTD[lane, t] = readout["out"]["weight"] @ y_HV.ravel()
    return out_BTD
