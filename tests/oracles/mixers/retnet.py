"""arXiv:2307.08621 in its parallel form, Eq. 5: every pair of tokens of a document."""

import numpy as np

from oracles.mixers.parts import rms_norm, rotate, silu


def retnet(params, config, x_BTD, reset_BT):
    out_BTD = np.zeros_like(x_BTD)
    readout = params["readout"]
    for lane, x_TD in enumerate(x_BTD):
        document, start = [], 0
        for t, x_D in enumerate(x_TD):
            if reset_BT[lane, t]:
                document, start = [], t
            q_HK, k_HK, v_HV = (
                (params[name]["weight"] @ x_D).reshape(config.heads, -1)
                for name in ("query", "key", "value")
            )
            if config.position.kind == "rotary":
                q_HK, k_HK = (rotate(a, t - start, config.position.base) for a in (q_HK, k_HK))
            document.append((k_HK, v_HV))
            o_HV = np.zeros_like(v_HV)
            for h in range(config.heads):
                decay = 1 - 2.0 ** (-5 - h)
                for age, (k_HK, v_HV) in enumerate(reversed(document)):
                    o_HV[h] += decay**age * (q_HK[h] @ k_HK[h]) * v_HV[h]
            o_HV /= np.sqrt(q_HK.shape[-1])
            gate_HV = silu(readout["gate"]["weight"] @ x_D).reshape(config.heads, -1)
            y_HV = rms_norm(o_HV, readout["norm"]["weight"]) * gate_HV
            out_BTD[lane, t] = readout["out"]["weight"] @ y_HV.ravel()
    return out_BTD
