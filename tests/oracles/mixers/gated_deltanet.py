"""arXiv:2412.06464, Eq. 10."""

import numpy as np

from oracles.mixers.parts import rms_norm, short_conv, sigmoid, silu, unit


def gated_deltanet(params, config, x_BTD, reset_BT):
    out_BTD, readout = np.zeros_like(x_BTD), params["readout"]
    for lane, x_TD in enumerate(x_BTD):
        streams = []
        for name in ("query", "key", "value"):
            stream_TF = x_TD @ params[name]["project"]["weight"].T
            if config.conv:
                weight = params[name]["conv"]["weight"]
                stream_TF = short_conv(stream_TF, reset_BT[lane], weight)
            streams.append(silu(stream_TF).reshape(len(x_TD), config.heads, -1))
        q_THK, k_THK, v_THV = unit(streams[0]), unit(streams[1]), streams[2]
        memory_HKV = np.zeros((config.heads, q_THK.shape[-1], v_THV.shape[-1]))
        for t, x_D in enumerate(x_TD):
            if reset_BT[lane, t]:
                memory_HKV = np.zeros_like(memory_HKV)
            beta_H = sigmoid(params["beta"]["weight"] @ x_D)
            beta_H = 2 * beta_H if config.negative_eigenvalues else beta_H
            step_H = np.log1p(np.exp(params["decay"]["weight"] @ x_D + params["step_bias"]))
            memory_HKV = np.exp(-np.exp(params["log_rate"]) * step_H)[:, None, None] * memory_HKV
            held_HV = np.einsum("hkv,hk->hv", memory_HKV, k_THK[t])
            change_HV = beta_H[:, None] * (v_THV[t] - held_HV)
            memory_HKV = memory_HKV + k_THK[t][:, :, None] * change_HV[:, None, :]
            o_HV = np.einsum("hkv,hk->hv", memory_HKV, q_THK[t]) / np.sqrt(q_THK.shape[-1])
            gate_HV = (readout["gate"]["weight"] @ x_D).reshape(config.heads, -1)
            y_HV = rms_norm(o_HV, readout["norm"]["weight"]) * silu(gate_HV)
            out_BTD[lane, t] = readout["out"]["weight"] @ y_HV.ravel()
    return out_BTD
