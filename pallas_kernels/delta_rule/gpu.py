"""The gated delta rule on a Hopper GPU: forward by `chunk_step_gpu`, backward in plain JAX.

The triangular systems of all chunks are solved in plain JAX, in float32; the kernel runs the chunks
in order: d = U - W S with U = T beta v and W = T beta exp(G) k.
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import chunk_step_gpu, dispatch, lanes, tile_math
from pallas_kernels.delta_rule.chunked import delta_rule_chunked
from pallas_kernels.linear_attention.tpu import fold_decay


def delta_rule_gpu(q, k, v, beta, log_decay, initial_state, reset, *, scale, chunk):
    """Same as the reference; see `pallas_kernels.delta_rule` for shapes.

    The backward pass differentiates the chunked form in plain JAX, which it computes once more.
    Unlike there, U, W, d and the states that are read are rounded to bfloat16.
    """
    return _delta_rule((float(scale), chunk), q, k, v, beta, log_decay, initial_state, reset)


def _solve(k_CK, v_CV, beta_1C, decay):
    """U and W of one tile."""
    beta_C1 = tile_math.as_column(beta_1C)
    i, j = tile_math.places(k_CK.shape[0])
    overlap_CC = tile_math.decayed_products(k_CK, k_CK, decay, jnp.float32)
    solve_CC = tile_math.unit_lower_inverse(beta_C1 * jnp.where(i > j, overlap_CC, 0))
    u_CV = tile_math.dot(solve_CC, beta_C1 * v_CV)
    w_CK = tile_math.dot(solve_CC, beta_C1 * tile_math.enter(decay) * k_CK)
    return u_CV, w_CK


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _delta_rule(settings, q, k, v, beta, log_decay, initial_state, reset):
    scale, chunk = settings
    batch, tokens, heads, key_size = q.shape
    q_NLK, k_NLK, v_NLV = (lanes.fold(x, chunk) for x in (q, k, v))
    documents = None if reset is None else lanes.documents(reset, chunk)
    shape = (batch * heads, q_NLK.shape[1] // chunk)
    decay = chunk_step_gpu.decay_of(fold_decay(log_decay, chunk), documents, shape)
    k_tiles, v_tiles = (chunk_step_gpu.in_chunks(x.astype(jnp.float32)) for x in (k_NLK, v_NLV))
    solve = jax.vmap(jax.vmap(_solve))
    u, w = solve(k_tiles, v_tiles, lanes.fold_rows(beta, chunk), decay)
    state = lanes.fold_state(initial_state, batch, heads, key_size, v.shape[-1], like=q)
    o_NLV, state = chunk_step_gpu.chunk_steps(
        q_NLK,
        k_NLK,
        u.reshape(v_NLV.shape).astype(jnp.bfloat16),
        w.reshape(k_NLK.shape).astype(jnp.bfloat16),
        chunk_step_gpu.gates_of(decay),
        state,
        scale=scale,
        interpreter=dispatch.current_target().interpreter,
    )
    state_BHKV = state.reshape(batch, heads, key_size, -1)
    return lanes.unfold(o_NLV, batch, tokens).astype(q.dtype), state_BHKV


def _forward(settings, *inputs):
    return _delta_rule(settings, *inputs), inputs


def _backward(settings, inputs, cotangents):
    *floating, reset = inputs
    scale, chunk = settings

    def again(*floating):
        return delta_rule_chunked(*floating, reset, scale=scale, chunk=chunk)

    _, pull = jax.vjp(again, *floating)
    return *pull(cotangents), None


_delta_rule.defvjp(_forward, _backward)
