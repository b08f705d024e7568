"""arXiv:2501.00663: the layers, token by token."""

import numpy as np

from oracles.mixers.parts import rms_norm, rotate, short_conv, sigmoid, silu, unit
from oracles.neural_memory import answer, neural_memory


def streams(params, config, x_TD, reset_T, convolved=("query", "key", "value")):
    """q, k, v [T, H, K] and the gates rate, keep, momentum [T, H]."""
    out = []
    for name in ("query", "key", "value"):
        stream_TD = x_TD @ params[name]["weight"].T
        if config.conv and name in convolved:
            stream_TD = short_conv(stream_TD, reset_T, params[f"{name}_conv"]["weight"])
        out.append(silu(stream_TD).reshape(len(x_TD), config.heads, -1))
    z_TG = x_TD @ params["gates"]["weight"].T + params["gate_bias"]
    gates = list(np.split(sigmoid(z_TG), z_TG.shape[1] // config.heads, axis=1))
    rate = config.rate_cap * gates.pop(0)
    momentum = gates.pop(0) if config.momentum else None
    keep = 1 - gates.pop(0) if config.forget else np.ones_like(rate)
    return unit(out[0]), unit(out[1]), out[2], rate, keep, momentum


def start(params, config, h):
    """The weights and the LayerNorm of one head at the start of a document."""
    weights = [params["weights"][f"layer_{i}"][h] for i in range(config.layers)]
    if not config.residual_norm:
        return weights, None
    return weights, (params["constants"]["scale"][h], params["constants"]["shift"][h], 1.0)


def deep_memory(params, config, x_TD, reset_T, convolved=("query", "key", "value")):
    """Answers o [T, H, V]."""
    q, k, v, rate, keep, momentum = streams(params, config, x_TD, reset_T, convolved)
    o_THV = np.zeros(v.shape)
    for h in range(config.heads):
        weights, norm = start(params, config, h)
        of_head = momentum if momentum is None else momentum[:, h]
        o_THV[:, h] = neural_memory(
            q[:, h],
            k[:, h],
            v[:, h],
            rate[:, h],
            keep[:, h],
            of_head,
            weights,
            norm,
            config.update_every,
            reset_T,
        )[0]
    return o_THV


def memory_layer(params, config, x_TD, reset_T):
    o_THV = deep_memory(params["memory"], config, x_TD, reset_T)
    gated_TD = rms_norm(o_THV, params["norm"]["weight"]).reshape(x_TD.shape)
    gated_TD = gated_TD * silu(x_TD @ params["gate"]["weight"].T)
    return gated_TD @ params["out"]["weight"].T


def titans_lmm(params, config, x_BTD, reset_BT):
    lanes = [memory_layer(params, config.memory, *lane) for lane in zip(x_BTD, reset_BT)]
    return np.stack(lanes)


def project_heads(params, name, config, x):
    return (x @ params[name]["weight"].T).reshape(len(x), config.heads, -1)


def softmax_over(q_HK, plain_HK, keys, values, persistent_keys, persistent_values):
    """One query over lists of [H, K]; persistent ones are asked with the query unturned."""
    out = np.zeros_like(q_HK)
    for h in range(len(q_HK)):
        scores = [k[h] @ q_HK[h] for k in keys] + [k[h] @ plain_HK[h] for k in persistent_keys]
        scores = np.array(scores) / np.sqrt(q_HK.shape[-1])
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        out[h] = sum(w * v[h] for w, v in zip(weights, [*values, *persistent_values]))
    return out


def turn(config, x_HK, position):
    if config.position.kind == "rotary":
        return rotate(x_HK, position, config.position.base)
    return x_HK


def window_attention(params, config, x_TD, reset_T):
    """A sliding window, and persistent tokens; [T, D] before the output projection."""
    memory = config.memory
    q, k, v = (project_heads(params, name, memory, x_TD) for name in ("query", "key", "value"))
    p_k, p_v = (
        project_heads(params, name, memory, params["persistent"]) for name in ("key", "value")
    )
    out_TD, keys, values, position = np.zeros_like(x_TD), [], [], 0
    for t in range(len(x_TD)):
        if reset_T[t]:
            keys, values, position = [], [], 0
        keys = [*keys, turn(config, k[t], position)][-config.window :]
        values = [*values, v[t]][-config.window :]
        turned = turn(config, q[t], position)
        out_TD[t] = softmax_over(turned, q[t], keys, values, p_k, p_v).ravel()
        position += 1
    return out_TD


def titans_mag(params, config, x_BTD, reset_BT):
    out_BTD = np.zeros_like(x_BTD)
    for lane, (x_TD, reset_T) in enumerate(zip(x_BTD, reset_BT)):
        near = window_attention(params["attention"], config, x_TD, reset_T)
        far = deep_memory(params["memory"], config.memory, x_TD, reset_T).reshape(x_TD.shape)
        near = rms_norm(near, params["attention_norm"]["weight"])
        far = rms_norm(far, params["memory_norm"]["weight"])
        out_BTD[lane] = (near * silu(far)) @ params["out"]["weight"].T
    return out_BTD


def titans_mal(params, config, x_BTD, reset_BT):
    out_BTD = np.zeros_like(x_BTD)
    for lane, (x_TD, reset_T) in enumerate(zip(x_BTD, reset_BT)):
        far = memory_layer(params["memory"], config.memory, x_TD, reset_T)
        far = rms_norm(far, params["norm"]["weight"])
        near = window_attention(params["attention"], config, far, reset_T)
        out_BTD[lane] = near @ params["out"]["weight"].T
    return out_BTD


def titans_mac(params, config, x_BTD, reset_BT):
    """Each token attends with its place in its segment, to what came before it there."""
    lanes = [mac_lane(params, config, *lane) for lane in zip(x_BTD, reset_BT)]
    return np.stack(lanes)


def mac_lane(params, config, x_TD, reset_T):
    """Token t of a segment that starts at s is computed from the whole document up to t."""
    memory, out_TD, start_of_document = config.memory, np.zeros_like(x_TD), 0
    a_TD = np.zeros_like(x_TD)
    for t in range(len(x_TD)):
        start_of_document = t if reset_T[t] else start_of_document
        first = t - (t - start_of_document) % config.segment
        document = slice(start_of_document, t + 1)
        here = slice(first, t + 1)
        h = recalled(params, memory, x_TD[document], a_TD[start_of_document:first], t - first + 1)
        h = rms_norm(h, params["recall_norm"]["weight"])
        a_TD[t] = segment_attention(params, config, h, x_TD[here])
        a_TD[t] = rms_norm(a_TD[t], params["attention_norm"]["weight"])
        no_reset = np.zeros(t + 1 - start_of_document, bool)
        a = a_TD[document]
        o = deep_memory(params["memory"], memory, a, no_reset, ("key", "value"))[-1].ravel()
        o = rms_norm(o, params["memory_norm"]["weight"])
        out_TD[t] = params["out"]["weight"] @ (a_TD[t] * silu(o))
    return out_TD


def recalled(params, memory, x_TD, before_TD, count):
    """M of the segments before, asked by the last `count` tokens of x; [count, D]."""
    no_reset = np.zeros(len(x_TD), bool)
    q = streams(params["memory"], memory, x_TD, no_reset)[0][-count:]
    out = np.zeros(q.shape)
    for h in range(memory.heads):
        weights, norm = start(params["memory"], memory, h)
        if len(before_TD):
            k_q, k, v, rate, keep, momentum = streams(
                params["memory"], memory, before_TD, np.zeros(len(before_TD), bool)
            )
            of_head = momentum if momentum is None else momentum[:, h]
            gates = (rate[:, h], keep[:, h], of_head)
            weights = neural_memory(
                k_q[:, h],
                k[:, h],
                v[:, h],
                *gates,
                weights,
                norm,
                memory.update_every,
                np.zeros(len(before_TD), bool),
            )[1]
        for i in range(count):
            out[i, h] = answer(weights, q[i, h], norm)[0]
    return out.reshape(count, -1)


def segment_attention(params, config, h_CD, x_CD):
    """The last token of a segment so far, over persistent tokens, h and x."""
    memory = config.memory
    keys, values = [], []
    for rows in (h_CD, x_CD):
        k, v = (project_heads(params, name, memory, rows) for name in ("key", "value"))
        keys += [turn(config, k[i], i) for i in range(len(rows))]
        values += list(v)
    p_k, p_v = (
        project_heads(params, name, memory, params["persistent"]) for name in ("key", "value")
    )
    q_HK = project_heads(params, "query", memory, x_CD[-1:])[0]
    turned = turn(config, q_HK, len(x_CD) - 1)
    return softmax_over(turned, q_HK, keys, values, p_k, p_v).ravel()
