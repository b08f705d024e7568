"""arXiv:1911.05507, Algorithms 1 and 2, token by token over lists of inputs."""

import numpy as np

from oracles.mixers.transformer_xl import relative_attention


def compress(params, config, old):
    groups = [old[i : i + config.rate] for i in range(0, len(old), config.rate)]
    if config.compression == "conv":
        weight = params["compression"]["weight"]
        return [weight @ np.concatenate(group) for group in groups]
    return [getattr(np, config.compression)(group, 0) for group in groups]


def content_attention(p, config, x_D, memory):
    q_HK = (p["query"]["weight"] @ x_D).reshape(config.heads, -1)
    k_MHK, v_MHK = (
        np.array([(p[name]["weight"] @ m).reshape(config.heads, -1) for m in memory])
        for name in ("key", "value")
    )
    out = []
    for h in range(config.heads):
        weights = np.exp(k_MHK[:, h] @ q_HK[h] / np.sqrt(q_HK.shape[-1]))
        out.append(weights @ v_MHK[:, h] / weights.sum())
    return np.concatenate(out)


def read(params, config, x_BTD, reset_BT):
    """Outputs, and the reconstruction error of every token."""
    out_BTD, error_BT = np.zeros_like(x_BTD), np.zeros(x_BTD.shape[:2])
    attention = params["attention"]
    for lane, x_TD in enumerate(x_BTD):
        for t, x_D in enumerate(x_TD):
            if t == 0 or reset_BT[lane, t]:
                memory = [np.zeros_like(x_D)] * config.memory
                compressed, current = [np.zeros_like(x_D)] * config.compressed, []
            if len(current) == config.segment:
                row = memory + current
                old, memory, current = row[: config.segment], row[config.segment :], []
                compressed = (compressed + compress(params, config, old))[-config.compressed :]
            current.append(x_D)
            row = compressed + memory + current
            context = [(x, len(row) - 1 - j) for j, x in enumerate(row)]
            o_D = relative_attention(attention, config, x_D, context)
            out_BTD[lane, t] = params["out"]["weight"] @ o_D
            old = memory[: config.segment]
            both = [old, compress(params, config, old)]
            whole, squeezed = (content_attention(attention, config, x_D, m) for m in both)
            error_BT[lane, t] = np.linalg.norm(whole - squeezed)
    return out_BTD, error_BT


def compressive(params, config, x_BTD, reset_BT):
    return read(params, config, x_BTD, reset_BT)[0]
