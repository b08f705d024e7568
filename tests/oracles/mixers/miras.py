"""arXiv:2504.13173: the layers, token by token."""

import dataclasses

import numpy as np

from oracles.miras import miras as memory_loop
from oracles.mixers.parts import rms_norm, rotate, short_conv, sigmoid, silu, unit


def described(config, constants, h):
    """The memory of head h, in the words of `oracles.miras`."""
    published = {"structure": "mlp", "learner": "gradient_descent"}
    norm = (constants["scale"][h], constants["shift"][h], 1.0) if constants else None
    if config.kind == "moneta":
        choices = {"bias": "lp", "retention": "lq", "floor": 0.5}
        powers = {"bias_power": config.error_power, "retention_power": config.retention_power}
        return published | choices | powers | {"norm": norm}
    if config.kind == "yaad":
        return published | {"bias": "huber", "retention": "weight_decay", "norm": norm}
    if config.kind == "memora":
        return published | {"bias": "l2", "retention": "kl", "total": config.total, "norm": norm}
    fields = dataclasses.asdict(config.retention)
    return {
        **{name: getattr(config, name).kind for name in ("structure", "bias", "retention")},
        "learner": config.learner.kind,
        "norm": norm and (*norm[:2], config.structure.norm_eps),
        "bias_power": getattr(config.bias, "power", None),
        "retention_power": fields.pop("power", None),
        **fields,
    }


def gates_of(memory, config, z_THG):
    """rate, keep, momentum, threshold from their logits, in that order of existence."""
    z = list(np.moveaxis(z_THG, -1, 0))
    rate = config.rate_cap * sigmoid(z.pop(0))
    momentum = sigmoid(z.pop(0)) if memory["learner"] != "gradient_descent" else None
    keep = 1 - sigmoid(z.pop(0)) if memory["retention"] != "none" else np.ones_like(rate)
    threshold = np.log1p(np.exp(z.pop(0))) if memory["bias"] in ("huber", "robust") else None
    assert not z
    return rate, keep, momentum, threshold


def miras(params, config, x_BTD, reset_BT):
    return np.stack([lane(params, config, x, reset) for x, reset in zip(x_BTD, reset_BT)])


def lane(params, config, x_TD, reset_T):
    heads, streams = config.heads, []
    for name in ("query", "key", "value"):
        stream = x_TD @ params[name]["project"]["weight"].T
        if config.conv:
            stream = short_conv(stream, reset_T, params[name]["conv"]["weight"])
        streams.append(silu(stream).reshape(len(x_TD), heads, -1))
    q, k, v = streams
    position = 0
    for t in range(len(x_TD)):
        position = 0 if reset_T[t] else position
        if config.position.kind == "rotary":
            q[t], k[t] = (rotate(a[t], position, config.position.base) for a in (q, k))
        position += 1
    q, k = unit(q), unit(k)
    z_TG = x_TD @ params["gates"]["weight"].T + params["gate_bias"]
    z_THG = np.swapaxes(z_TG.reshape(len(x_TD), -1, heads), 1, 2)
    o = np.zeros(v.shape)
    for h in range(heads):
        memory = described(config, params.get("constants", {}), h)
        start = [params["weights"][f"layer_{i}"][h] for i in range(len(params["weights"]))]
        gates = gates_of(memory, config, z_THG[:, h])
        o[:, h] = memory_loop(
            memory, q[:, h], k[:, h], v[:, h], *gates, start, config.update_every, reset_T
        )[0]
    read = params["readout"]
    y_TD = rms_norm(o, read["norm"]["weight"]).reshape(x_TD.shape)
    return (y_TD * silu(x_TD @ read["gate"]["weight"].T)) @ read["out"]["weight"].T
