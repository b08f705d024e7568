"""Attention sinks: a logit a head that enters every softmax and brings no value.

    o_t = sum_j e^{s_tj} v_j / (e^sink + sum_j e^{s_tj})

A sink is one more key whose value is 0, so it is added behind the kernels, by log-sum-exp, and
their backward passes hold as they are with the new one.
"""

import jax
import jax.numpy as jnp


def add_sinks(
    o_BGRTV: jax.Array, lse_BGRT1: jax.Array, sinks_GR: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The output and log-sum-exp of the same queries over their keys and the sinks.

    lse' = log(e^lse + e^sink)        o' = o e^{lse - lse'}
    """
    if sinks_GR is None:
        return o_BGRTV, lse_BGRT1
    with_sinks = jnp.logaddexp(lse_BGRT1, sinks_GR[:, :, None, None])
    return o_BGRTV * jnp.exp(lse_BGRT1 - with_sinks), with_sinks


def sink_gradients(sinks_GR: jax.Array, lse_BGRT1: jax.Array, dot_BGRT1: jax.Array) -> jax.Array:
    """d sink = -sum_t e^{sink - lse'_t} o'_t . d o'_t, from the lse with sinks and those products.

    As d s_j = p_j (v_j . d o' - o' . d o') of a key, with v = 0.
    """
    weights_BGRT1 = jnp.exp(sinks_GR[:, :, None, None] - lse_BGRT1)
    return -jnp.sum(weights_BGRT1 * dot_BGRT1, axis=(0, 3, 4))
