"""Test-time training token by token, weights updated one by one: the definition."""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.blocks.reference import Tokens, scan_tokens
from pallas_kernels.products import accumulation_dtype
from pallas_kernels.ttt.rule import apply_linear, apply_mlp, loss, normalise


def ttt_reference(apply, q, k, v, rate, place_rate, memory, norm, state, reset):
    """Gradients G by autodiff at the weights W0 that entered the block:

    S_i = S_{i-1} + rate_i G_i;  W_i = W0 - place_rate_i S_i;  o_i = q_i + LN(W_i(q_i))
    """
    dtype = accumulation_dtype(q, k, v)
    norm = jax.tree.map(lambda x: x.astype(dtype), norm)

    def head(carry, sums, norm, q_K, k_K, v_K, rate, place_rate):
        gradient = jax.grad(partial(loss, apply))(carry, norm, k_K, v_K)
        sums = jax.tree.map(lambda s, g: s + rate * g, sums, gradient)
        now = jax.tree.map(lambda w, s: w - place_rate * s, carry, sums)
        return sums, now, q_K + normalise(apply(now, q_K), norm)

    heads = jax.vmap(jax.vmap(head, (0, 0, 0, 0, 0, 0, 0, None)), (0, 0, None, 0, 0, 0, 0, 0))

    def begin(carry):
        return jax.tree.map(jnp.zeros_like, carry), carry

    def token(carry, running, x, place_B):
        (k_BHK, v_BHK, rate_BH), q_BHK = jax.tree.map(lambda a: a.astype(dtype), x)
        sums, now, o_BHK = heads(
            carry, running[0], norm, q_BHK, k_BHK, v_BHK, rate_BH, place_rate[place_B]
        )
        return (sums, now), o_BHK

    rule = Tokens(begin, token, lambda running: running[1])
    block = len(place_rate)
    o, state = scan_tokens(rule, memory, state, (k, v, rate), reset, block=block, queries=q)
    return o.astype(q.dtype), state


ttt_linear_reference = partial(ttt_reference, apply_linear)
ttt_mlp_reference = partial(ttt_reference, apply_mlp)
