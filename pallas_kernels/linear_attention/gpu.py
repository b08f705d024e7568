"""Gated linear attention on a Hopper GPU: forward by `chunk_step_gpu`, backward in plain JAX."""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import chunk_step_gpu, dispatch, lanes
from pallas_kernels.linear_attention.chunked import linear_attention_chunked
from pallas_kernels.linear_attention.tpu import fold_decay


def linear_attention_gpu(q, k, v, log_decay, initial_state, reset, *, scale, chunk):
    """Same as the reference; see `pallas_kernels.linear_attention` for shapes.

    The backward pass differentiates the chunked form in plain JAX, which it computes once more.
    """
    return _attention((float(scale), chunk), q, k, v, log_decay, initial_state, reset)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(settings, q, k, v, log_decay, initial_state, reset):
    scale, chunk = settings
    batch, tokens, heads, key_size = q.shape
    folded = [lanes.fold(x, chunk) for x in (q, k, v)]
    documents = None if reset is None else lanes.documents(reset, chunk)
    shape = (batch * heads, folded[0].shape[1] // chunk)
    decay = chunk_step_gpu.decay_of(fold_decay(log_decay, chunk), documents, shape)
    state = lanes.fold_state(initial_state, batch, heads, key_size, v.shape[-1], like=q)
    o_NLV, state = chunk_step_gpu.chunk_steps(
        *folded,
        None,
        chunk_step_gpu.gates_of(decay),
        state,
        scale=scale,
        interpreter=dispatch.current_target().interpreter,
    )
    state_BHKV = state.reshape(batch, heads, key_size, -1)
    return lanes.unfold(o_NLV, batch, tokens).astype(q.dtype), state_BHKV


def _forward(settings, *inputs):
    return _attention(settings, *inputs), inputs


def _backward(settings, inputs, cotangents):
    *floating, reset = inputs
    scale, chunk = settings

    def again(*floating):
        return linear_attention_chunked(*floating, reset, scale=scale, chunk=chunk)

    _, pull = jax.vjp(again, *floating)
    d_o, d_state = cotangents
    return *pull((d_o, d_state.astype(jnp.float32))), None


_attention.defvjp(_forward, _backward)
