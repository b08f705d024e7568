"""Test-time training in its dual form, plain JAX: no weights of single tokens.

With g_j the gradients of the loss at the memory's output, all at the weights W, c that entered the
block, token i reads

    q_i W_i + c_i = q_i W + c - place_rate_i sum_{j <= i} rate_j (q_i . k_j + 1) g_j

Only the g_j and the update of the weights wait for the previous block. The rest is computed for all
blocks of a round at once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import Body, scan_blocks
from pallas_kernels.products import accumulation_dtype, columns_dot_columns, dot, rows_dot_rows
from pallas_kernels.ttt.rule import EPSILON, LinearMemory, MLPMemory, Norm, normalise


class _Prepared(NamedTuple):
    q_BHCK: jax.Array
    k_BHCK: jax.Array
    target_BHCK: jax.Array
    step_BHCC: jax.Array  # rate of token j for token i; 0 where j is later
    last_BHC1: jax.Array  # rate of token j for the next block
    scores_BHCC: jax.Array  # step (q_i . k_j + 1)


def _prepare(consts, xs, valid_NBC):
    place_rate_C, norm = consts
    (k, v, rate), q = xs
    dtype = norm.scale_HK.dtype
    q, k, v, rate = (jnp.swapaxes(x.astype(dtype), 2, 3) for x in (q, k, v, rate[..., None]))
    step_NBHCC = jnp.tril(place_rate_C[:, None] * jnp.swapaxes(rate, -1, -2))
    scores_NBHCC = step_NBHCC * (rows_dot_rows(q, k) + 1)
    return _Prepared(q, k, v - k, step_NBHCC, place_rate_C[-1] * rate, scores_NBHCC)


def output_gradient(z_BHCK: jax.Array, target_BHCK: jax.Array, norm: Norm) -> jax.Array:
    """The gradient of 1/2 |LN(z) - target|^2 with respect to z."""
    centred = z_BHCK - jnp.mean(z_BHCK, -1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(centred * centred, -1, keepdims=True) + EPSILON)
    standard = centred * scale
    gain, shift = norm.scale_HK[:, None], norm.shift_HK[:, None]
    inner = (standard * gain + shift - target_BHCK) * gain
    along = jnp.mean(inner * standard, -1, keepdims=True)
    return (inner - jnp.mean(inner, -1, keepdims=True) - standard * along) * scale


def _step_linear(consts, carry, prepared):
    weight_BHKK, bias_BHK = carry
    _, k_BHCK, target_BHCK, _, last_BHC1, _ = prepared
    z_BHCK = dot(k_BHCK, weight_BHKK) + bias_BHK[..., None, :]
    change_BHCK = output_gradient(z_BHCK, target_BHCK, consts[1])
    weight_BHKK = weight_BHKK - columns_dot_columns(last_BHC1 * k_BHCK, change_BHCK)
    bias_BHK = bias_BHK - jnp.sum(last_BHC1 * change_BHCK, -2)
    return LinearMemory(weight_BHKK, bias_BHK), change_BHCK


def _finish_linear(consts, carry, prepared, change_NBHCK):
    weight_NBHKK, bias_NBHK = carry
    z_NBHCK = dot(prepared.q_BHCK, weight_NBHKK) + bias_NBHK[..., None, :]
    z_NBHCK = z_NBHCK - dot(prepared.scores_BHCC, change_NBHCK)
    return _read_out(consts, prepared, z_NBHCK)


def _read_out(consts, prepared, z_NBHCK):
    norm = Norm(*(x[:, None] for x in consts[1]))
    return jnp.swapaxes(prepared.q_BHCK + normalise(z_NBHCK, norm), 2, 3)


def _step_mlp(consts, carry, prepared):
    weight_in_BHKF, bias_in_BHF, weight_out_BHFK, bias_out_BHK = carry
    _, k_BHCK, target_BHCK, _, last_BHC1, _ = prepared
    z_BHCF = dot(k_BHCK, weight_in_BHKF) + bias_in_BHF[..., None, :]
    hidden_BHCF, pull = jax.vjp(jax.nn.gelu, z_BHCF)
    z_BHCK = dot(hidden_BHCF, weight_out_BHFK) + bias_out_BHK[..., None, :]
    change_BHCK = output_gradient(z_BHCK, target_BHCK, consts[1])
    (change_BHCF,) = pull(rows_dot_rows(change_BHCK, weight_out_BHFK))
    carry = MLPMemory(
        weight_in_BHKF - columns_dot_columns(last_BHC1 * k_BHCK, change_BHCF),
        bias_in_BHF - jnp.sum(last_BHC1 * change_BHCF, -2),
        weight_out_BHFK - columns_dot_columns(hidden_BHCF, last_BHC1 * change_BHCK),
        bias_out_BHK - jnp.sum(last_BHC1 * change_BHCK, -2),
    )
    return carry, (hidden_BHCF, change_BHCF, change_BHCK)


def _finish_mlp(consts, carry, prepared, kept):
    weight_in_NBHKF, bias_in_NBHF, weight_out_NBHFK, bias_out_NBHK = carry
    hidden_NBHCF, change_NBHCF, change_NBHCK = kept
    z_NBHCF = dot(prepared.q_BHCK, weight_in_NBHKF) + bias_in_NBHF[..., None, :]
    read_NBHCF = jax.nn.gelu(z_NBHCF - dot(prepared.scores_BHCC, change_NBHCF))
    scores_NBHCC = prepared.step_BHCC * (rows_dot_rows(read_NBHCF, hidden_NBHCF) + 1)
    z_NBHCK = dot(read_NBHCF, weight_out_NBHFK) + bias_out_NBHK[..., None, :]
    return _read_out(consts, prepared, z_NBHCK - dot(scores_NBHCC, change_NBHCK))


LINEAR = Body(_step_linear, _prepare, _finish_linear)
MLP = Body(_step_mlp, _prepare, _finish_mlp)


def ttt_chunked(body, q, k, v, rate, place_rate, memory, norm, state, reset):
    """Same as the reference; see `pallas_kernels.ttt` for shapes."""
    dtype = accumulation_dtype(q, k, v)
    consts = jax.tree.map(lambda x: x.astype(dtype), (place_rate, norm))
    block = len(place_rate)
    o, state = scan_blocks(body, consts, memory, state, (k, v, rate), reset, block=block, queries=q)
    return o.astype(q.dtype), state
