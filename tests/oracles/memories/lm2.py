"""arXiv:2502.06049, repaired: tokens read slots token by token, slots read a segment at its end."""

import numpy as np

from oracles.mixers.parts import sigmoid


def lm2(params, shared, config, x_BTD, reset_BT):
    out_BTD = np.zeros_like(x_BTD)
    p = {name: value["weight"] for name, value in params.items()}
    bias = {name: value.get("bias") for name, value in params.items()}
    for lane, x_TD in enumerate(x_BTD):
        bank_MD, tokens = np.eye(config.slots, x_TD.shape[1]), []
        for t, x_D in enumerate(x_TD):
            if reset_BT[lane, t]:
                bank_MD, tokens = np.eye(config.slots, x_TD.shape[1]), []
            e_D = _attend(p["query"] @ x_D, bank_MD @ p["key"].T, bank_MD @ p["value"].T, config)
            out_BTD[lane, t] = sigmoid(p["output_gate"] @ e_D + bias["output_gate"]) * e_D
            tokens.append(x_D)
            if len(tokens) == config.segment:
                keys, values = tokens @ p["write_key"].T, tokens @ p["write_value"].T
                rows = []
                for slot_D in bank_MD:
                    u_D = _attend(p["write_query"] @ slot_D, keys, values, config)
                    into = sigmoid(p["input_gate"] @ u_D + bias["input_gate"])
                    keep = sigmoid(p["forget_gate"] @ u_D + bias["forget_gate"])
                    rows.append(into * np.tanh(u_D) + keep * slot_D)
                bank_MD, tokens = np.array(rows), []
    return out_BTD


def _attend(q_D, k_JD, v_JD, config):
    parts = []
    for q, k, v in zip(*(np.split(a, config.heads, -1) for a in (q_D, k_JD, v_JD))):
        scores = k @ q / np.sqrt(len(q))
        weights = np.exp(scores - scores.max())
        parts.append(weights @ v / weights.sum())
    return np.concatenate(parts)
