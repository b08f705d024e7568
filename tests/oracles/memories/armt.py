"""arXiv:2407.04841, Sec. 2: what a layer's matrix answers to a token, and what slots write."""

import numpy as np

from oracles.mixers.parts import sigmoid

EPS = 1e-5


def armt_read(params, config, A_FD, z_F, x_D):
    return _recall(A_FD, z_F, _phi(params["query"]["weight"] @ x_D, config.order))


def armt_write(params, config, A_FD, z_F, x_MD):
    new_A, new_z = A_FD.copy(), z_F.copy()
    for x_D in x_MD:
        phi = _phi(params["key"]["weight"] @ x_D, config.order)
        v = params["value"]["weight"] @ x_D
        beta = sigmoid(params["rate"]["weight"] @ x_D + params["rate"]["bias"])
        gamma = np.clip(1 - phi @ z_F / (phi @ phi + EPS), 0, 1)
        new_A += beta * np.outer(phi, v - _recall(A_FD, z_F, phi))
        new_z += gamma * phi
    return new_A, new_z


def _recall(A_FD, z_F, phi_F):
    return phi_F @ A_FD / (phi_F @ z_F + EPS)


def _phi(x_K, order):
    r = np.maximum(np.concatenate([x_K, -x_K]), 0)
    return np.concatenate([[r[i] * r[i - j] for i in range(len(r))] for j in range(1, order + 1)])
