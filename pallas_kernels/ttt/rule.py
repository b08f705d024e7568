"""What a test-time-trained memory is: its weights, its read-out, its loss; one head, one token."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

EPSILON = 1e-6


class LinearMemory(NamedTuple):
    """x -> x W + c."""

    weight_HKK: jax.Array
    bias_HK: jax.Array


class MLPMemory(NamedTuple):
    """x -> gelu(x W + c) U + d, with the tanh approximation of gelu."""

    weight_in_HKF: jax.Array
    bias_in_HF: jax.Array
    weight_out_HFK: jax.Array
    bias_out_HK: jax.Array


class Norm(NamedTuple):
    """The layer norm of the memory's output; shared by all tokens, not changed at test time."""

    scale_HK: jax.Array
    shift_HK: jax.Array


def apply_linear(memory: LinearMemory, x_K: jax.Array) -> jax.Array:
    weight_KK, bias_K = memory
    return jnp.dot(x_K, weight_KK, precision=jax.lax.Precision.HIGHEST) + bias_K


def apply_mlp(memory: MLPMemory, x_K: jax.Array) -> jax.Array:
    weight_in_KF, bias_in_F, weight_out_FK, bias_out_K = memory
    hidden_F = jax.nn.gelu(apply_linear(LinearMemory(weight_in_KF, bias_in_F), x_K))
    return apply_linear(LinearMemory(weight_out_FK, bias_out_K), hidden_F)


def normalise(z: jax.Array, norm: Norm) -> jax.Array:
    """LayerNorm over the last axis."""
    centred = z - jnp.mean(z, -1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(centred * centred, -1, keepdims=True) + EPSILON)
    return centred * scale * norm.scale_HK + norm.shift_HK


def loss(apply: Callable, memory: Any, norm: Norm, k_K: jax.Array, v_K: jax.Array) -> jax.Array:
    """1/2 |k + LN(memory(k)) - v|^2."""
    error_K = k_K + normalise(apply(memory, k_K), norm) - v_K
    return 0.5 * jnp.sum(error_K * error_K)
