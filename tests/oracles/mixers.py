"""NumPy float64 token loops of whole mixers, from the papers' equations.

`ORACLES[kind](params, config, x_BTD, reset_BT)` returns y_BTD from the initial state; `params` are
the mixer's own, as nested dicts of float64 arrays.
"""

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def rms_norm(x, weight, eps=1e-6):
    return weight * x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps)


def unit(x, eps=1e-6):
    return x / np.sqrt(np.sum(x * x, -1, keepdims=True) + eps)


def short_conv(x_TF, reset_T, weight_WF):
    """Taps reach back to the latest reset and no further."""
    out, start = np.zeros_like(x_TF), 0
    for t in range(len(x_TF)):
        start = t if reset_T[t] else start
        for lag in range(len(weight_WF)):
            if t - lag >= start:
                out[t] += weight_WF[lag] * x_TF[t - lag]
    return out


def rotate(x_HK, position, base):
    half = x_HK.shape[-1] // 2
    out = np.empty_like(x_HK)
    for i in range(half):
        angle = position * base ** (-2 * i / x_HK.shape[-1])
        a, b = x_HK[:, i], x_HK[:, i + half]
        out[:, i] = a * np.cos(angle) - b * np.sin(angle)
        out[:, i + half] = b * np.cos(angle) + a * np.sin(angle)
    return out


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
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                heads.append(sum(w * v[g] for w, v in zip(weights, values)))
            out_BTD[lane, t] = params["out"]["weight"] @ np.concatenate(heads)
            position += 1
    return out_BTD


def linear_attention(params, config, x_BTD, reset_BT):
    out_BTD = np.zeros_like(x_BTD)
    for lane, x_TD in enumerate(x_BTD):
        memory_HKV = 0.0
        for t, x_D in enumerate(x_TD):
            q_HK, k_HK, v_HV, gate_HV = (
                (params[name]["weight"] @ x_D).reshape(config.heads, -1)
                for name in ("query", "key", "value", "gate")
            )
            decay = np.ones((config.heads, 1, 1))
            if config.decay == "scalar":
                score_H = params["decay"]["weight"] @ x_D + params["decay"]["bias"]
                decay = (sigmoid(score_H) ** (1 / 16))[:, None, None]
            if config.decay == "vector":
                low = params["decay_into"]["weight"] @ x_D
                score = params["decay"]["weight"] @ low + params["decay"]["bias"]
                decay = (sigmoid(score) ** (1 / 16)).reshape(config.heads, -1, 1)
            if reset_BT[lane, t]:
                memory_HKV = 0.0
            memory_HKV = decay * memory_HKV + k_HK[:, :, None] * v_HV[:, None, :]
            o_HV = np.einsum("hk,hkv->hv", q_HK, memory_HKV) / np.sqrt(q_HK.shape[-1])
            y_HV = rms_norm(o_HV, params["norm"]["weight"]) * silu(gate_HV)
            out_BTD[lane, t] = params["out"]["weight"] @ y_HV.ravel()
    return out_BTD


def gated_deltanet(params, config, x_BTD, reset_BT):
    out_BTD = np.zeros_like(x_BTD)
    for lane, x_TD in enumerate(x_BTD):
        streams = []
        for name in ("query", "key", "value"):
            stream_TF = x_TD @ params[name]["weight"].T
            if config.conv:
                weight = params[f"{name}_conv"]["weight"]
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
            gate_HV = (params["gate"]["weight"] @ x_D).reshape(config.heads, -1)
            y_HV = rms_norm(o_HV, params["norm"]["weight"]) * silu(gate_HV)
            out_BTD[lane, t] = params["out"]["weight"] @ y_HV.ravel()
    return out_BTD


def lstm(params, config, x_BTD, reset_BT):
    out_BTD = np.zeros_like(x_BTD)
    width = x_BTD.shape[-1]
    for lane, x_TD in enumerate(x_BTD):
        cell, hidden = np.zeros(width), np.zeros(width)
        for t, x_D in enumerate(x_TD):
            if reset_BT[lane, t]:
                cell, hidden = np.zeros(width), np.zeros(width)
            gates = params["into"]["weight"] @ x_D + params["bias"]
            i, f, g, o = np.split(gates + params["recurrent"] @ hidden, 4)
            cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
            hidden = sigmoid(o) * np.tanh(cell)
            out_BTD[lane, t] = params["out"]["weight"] @ hidden
    return out_BTD


ORACLES = {
    "attention": attention,
    "linear_attention": linear_attention,
    "gated_deltanet": gated_deltanet,
    "lstm": lstm,
}
