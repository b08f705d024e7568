"""arXiv:2502.13685, Sec. 3: memories one by one, each fed the tokens that chose it."""

import numpy as np

from oracles.mixers.parts import rms_norm, short_conv, sigmoid, silu, unit


def mom(params, config, x_BTD, reset_BT):
    out_BTD = np.zeros_like(x_BTD)
    count, heads = config.memories + config.shared, config.heads
    readout = params["readout"]
    for lane, x_TD in enumerate(x_BTD):
        q_THK = _stream(params["query"], x_TD, reset_BT[lane], config).reshape(len(x_TD), heads, -1)
        k_TMHK, v_TMHV = (
            _stream(params[name], x_TD, reset_BT[lane], config).reshape(len(x_TD), count, heads, -1)
            for name in ("key", "value")
        )
        if config.inner in ("delta", "gated_delta"):
            q_THK, k_TMHK = unit(q_THK), unit(k_TMHK)
        memories = {}
        for t, x_D in enumerate(x_TD):
            if reset_BT[lane, t]:
                memories = {}
            o_HV = np.zeros(v_TMHV.shape[-2:])
            for m, weight in _route(params["router"]["weight"] @ x_D, config):
                for h in range(heads):
                    S = memories.get((m, h), np.zeros((q_THK.shape[-1], o_HV.shape[-1])))
                    S = _write(params, config, S, k_TMHK[t, m, h], v_TMHV[t, m, h], x_D, m, h)
                    memories[m, h] = S
                    o_HV[h] += weight * (S.T @ q_THK[t, h]) / np.sqrt(q_THK.shape[-1])
            gate_HV = silu(readout["gate"]["weight"] @ x_D).reshape(heads, -1)
            y_HV = rms_norm(o_HV, readout["norm"]["weight"]) * gate_HV
            out_BTD[lane, t] = readout["out"]["weight"] @ y_HV.ravel()
    return out_BTD


def _stream(params, x_TD, reset_T, config):
    stream_TF = x_TD @ params["project"]["weight"].T
    if config.conv:
        stream_TF = short_conv(stream_TF, reset_T, params["conv"]["weight"])
    return silu(stream_TF)


def _route(score_M, config):
    """(memory, weight) of those chosen, the shared one last."""
    p_M = np.exp(score_M - score_M.max())
    p_M /= p_M.sum()
    top = np.argsort(-p_M, kind="stable")[: config.top_k]
    chosen = [(m, p_M[m] / p_M[top].sum()) for m in top]
    return chosen + ([(config.memories, 1.0)] if config.shared else [])


def _write(params, config, S, k, v, x, m, h):
    gates, row = params.get("gates", {}), m * config.heads + h
    if config.inner == "gated_delta":
        step = np.log1p(np.exp(gates["decay"]["weight"][row] @ x + gates["step_bias"][h]))
        S = np.exp(-np.exp(gates["log_rate"][h]) * step) * S
    if config.inner in ("delta", "gated_delta"):
        beta = sigmoid(gates["beta"]["weight"][row] @ x)
        return S + np.outer(k, beta * (v - S.T @ k))
    if config.inner == "retention":
        S = (1 - 2.0 ** (-5 - h)) * S
    if config.inner == "gla":
        rows = slice(row * len(k), (row + 1) * len(k))
        score = gates["decay"]["weight"][rows] @ (gates["into"]["weight"] @ x)
        S = (sigmoid(score + gates["decay"]["bias"][rows]) ** (1 / 16))[:, None] * S
    return S + np.outer(k, v)
