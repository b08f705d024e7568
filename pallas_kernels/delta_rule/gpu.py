"""The gated delta rule on a Hopper GPU, forward and backward.

Forward: `gpu_solve` (U, W of all chunks at once), `gpu_walk` (D and the states, in order),
`gpu_tokens` (outputs, all at once). T is kept for the backward pass, which computes the rest again,
then walks backward for dD and the cotangents R of the states, and makes all else of all chunks at
once:

    dQ = tokens of (dO, D, K; S)     dW = -dD ST     dK = tokens of (D, dO, Q; R), backward
    dU = dD                          and what `gpu_solve` gives for dU and dW
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, lanes
from pallas_kernels.chunk_gates_gpu import decay_gradient, flat, gates_of, heads_of, row_products
from pallas_kernels.delta_rule.gpu_solve import solve, solve_gradient
from pallas_kernels.delta_rule.gpu_tokens import tokens_of
from pallas_kernels.delta_rule.gpu_walk import walk
from pallas_kernels.parts_gpu import in_value_parts, in_whole_tiles, size_unfit
from pallas_kernels.warpgroup_gpu import SIZES, card_unfit, dtype_unfit

KEY_SIZES = (*SIZES, 256)
ANCHOR = 8  # chunks; sums of the decay's gradient start anew behind so many


def unfit(q, k, v, log_decay) -> str | None:
    """Why the kernels cannot take a call."""
    if log_decay is not None and log_decay.ndim == 4:
        return "log_decay must be None or one a head"
    return size_unfit(q, v, KEY_SIZES[-1]) or dtype_unfit(q=q, k=k, v=v) or card_unfit()


def delta_rule_gpu(q, k, v, beta, log_decay, initial_state, reset, *, scale, chunk):
    """Same as the reference; see `pallas_kernels.delta_rule` for shapes.

    Unlike in plain JAX, U, W, D and the states that are read are rounded to bfloat16. Chunks are of
    64 tokens, whatever `chunk` is.
    """
    del chunk

    def run(q, k, beta, log_decay, v, state):
        return _delta_rule(float(scale), q, k, v, beta, log_decay, state, reset)

    def in_parts(q, k, v, log_decay, state):
        # Of 128 values and K = 256 tiles do not fit.
        most = 64 if q.shape[-1] > 128 else 128
        return in_value_parts(run, (q, k, beta, log_decay), v, state, most=most)

    return in_whole_tiles(in_parts, q, k, v, log_decay, initial_state, sizes=KEY_SIZES)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _delta_rule(scale, *inputs):
    return _forward(scale, *inputs)[0]


def _states(k_BTF, u, w, gates, state, settings):
    return walk([k_BTF, w], u, gates, state, scale=1.0, reverse=False, **settings)


def _forward(scale, q, k, v, beta, log_decay, initial_state, reset):
    batch, tokens, heads, key_size = q.shape
    q_, k_, v_ = (flat(x) for x in (q, k, v))
    gates = gates_of(log_decay, reset, batch, heads, q_.shape[1], beta=beta)
    state = lanes.fold_state(initial_state, batch, heads, key_size, v.shape[-1], like=q)
    settings = {"heads": heads, "interpreter": dispatch.current_target().interpreter}
    u, w, solved = solve(k_, v_, gates, **settings)
    d, states, last = _states(k_, u, w, gates, state, settings)
    (o,) = tokens_of(q_, k_, d, states, gates, scale=scale, state_scale=scale, **settings)
    o = heads_of(o, heads, tokens)
    residuals = (q, k, v, beta, log_decay, initial_state, reset, gates, solved, o)
    return (o, last.reshape(batch, heads, key_size, -1)), residuals


def _backward(scale, residuals, cotangents):
    q, k, v, beta, log_decay, initial_state, reset, gates, solved, o = residuals
    d_o, d_last = cotangents
    batch, tokens, heads, key_size = q.shape
    q_, k_, v_, d_o_ = (flat(x) for x in (q, k, v, d_o.astype(jnp.bfloat16)))
    state = lanes.fold_state(initial_state, batch, heads, key_size, v.shape[-1], like=q)
    settings = {"heads": heads, "interpreter": dispatch.current_target().interpreter}
    u, w = solve(k_, v_, gates, solved, **settings)
    d, states, last = _states(k_, u, w, gates, state, settings)
    d_last = d_last.astype(jnp.float32).reshape(state.shape)
    less, behind, d_state = walk(
        [q_, k_, w], d_o_, gates, d_last, scale=scale, reverse=True, **settings
    )
    across = partial(tokens_of, gates_NMGC=gates, scale=scale, across=True, **settings)
    d_q, d_w, d_less = across(d_o_, d, k_, states, state_scale=scale, extra_BTF=less)
    (d_k,) = across(d, d_o_, q_, behind, state_scale=1.0, reverse=True)
    d_k, d_v, numbers = solve_gradient(k_, v_, u, w, solved, less, d_w, d_k, gates, **settings)
    d_q, d_k, d_v = (heads_of(x, heads, tokens) for x in (d_q, d_k, d_v))

    numbers = jnp.concatenate([numbers, d_less[:, :, None]], 2)
    numbers = jnp.moveaxis(numbers, 2, 0).reshape(3, batch, heads, -1)[..., :tokens]
    d_beta, d_gate, d_less = jnp.swapaxes(numbers, 2, 3)
    d_log_decay = d_initial = None
    if log_decay is not None:
        d_gate = d_gate + row_products(d_o, o) + d_less
        ahead = _ahead(states, last, behind).reshape(batch, heads, -1)
        d_log_decay = decay_gradient(d_gate, log_decay, reset, ahead)
    if initial_state is not None:
        d_initial = d_state.reshape(initial_state.shape).astype(initial_state.dtype)
    return d_q, d_k, d_v, d_beta.astype(beta.dtype), d_log_decay, d_initial, None


def _ahead(states_NMKV, last_NKV, behind_NMKV):
    """The product of the state behind each group of chunks with its cotangent, `[N, groups]`."""
    chunks = states_NMKV.shape[1]
    groups = -(-chunks // ANCHOR)
    per_group = -(-chunks // groups)
    groups = -(-chunks // per_group)
    ends = [min((n + 1) * per_group, chunks) for n in range(groups)]
    states = jnp.stack([states_NMKV[:, n] for n in ends[:-1]] + [last_NKV], 1)
    behind = jnp.stack([behind_NMKV[:, n - 1] for n in ends], 1)
    return jnp.sum(states.astype(jnp.float32) * behind.astype(jnp.float32), (-1, -2))


_delta_rule.defvjp(_forward, _backward)
