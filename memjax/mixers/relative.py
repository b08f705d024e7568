"""Attention with the relative positions of Transformer-XL."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from memjax.config import check
from memjax.layers import Linear, check_heads, dot_transposed
from pallas_kernels.products import columns_dot_columns, dot, rows_dot_rows


@jax.custom_vjp
def scores_of(q_CK: jax.Array, k_JK: jax.Array, own_k_JK: jax.Array, own_CJ: jax.Array):
    """q kT, `[..., C, J]`. The last keys once more as `own_k`, whose values are not read.

    k gets the gradient of all pairs, own_k of those in `own`: so that the maps that made the keys
    learn from all pairs, and the tokens that they were made of from some.
    """
    return rows_dot_rows(q_CK, k_JK)


def _scores_forward(q_CK, k_JK, own_k_JK, own_CJ):
    return scores_of(q_CK, k_JK, own_k_JK, own_CJ), (q_CK, k_JK, own_CJ)


def _scores_backward(residuals, g_CJ):
    q_CK, k_JK, own_CJ = residuals
    d_own = columns_dot_columns(_own(g_CJ, own_CJ), q_CK).astype(k_JK.dtype)
    d_q = dot(g_CJ, k_JK).astype(q_CK.dtype)
    return d_q, columns_dot_columns(g_CJ, q_CK).astype(k_JK.dtype), d_own, None


@jax.custom_vjp
def sums_of(weight_CJ: jax.Array, v_JV: jax.Array, own_v_JV: jax.Array, own_CJ: jax.Array):
    """weight v, `[..., C, V]`, with gradients as of `scores_of`."""
    return dot(weight_CJ, v_JV)


def _sums_forward(weight_CJ, v_JV, own_v_JV, own_CJ):
    return sums_of(weight_CJ, v_JV, own_v_JV, own_CJ), (weight_CJ, v_JV, own_CJ)


def _sums_backward(residuals, g_CV):
    weight_CJ, v_JV, own_CJ = residuals
    g_CV = g_CV.astype(v_JV.dtype)
    d_own = columns_dot_columns(_own(weight_CJ, own_CJ), g_CV).astype(v_JV.dtype)
    d_weight = rows_dot_rows(g_CV, v_JV).astype(weight_CJ.dtype)
    return d_weight, columns_dot_columns(weight_CJ, g_CV).astype(v_JV.dtype), d_own, None


def _own(x_CJ: jax.Array, own_CJ: jax.Array) -> jax.Array:
    """The columns of the own keys, which are the last, 0 where they are not own."""
    return jnp.where(own_CJ, x_CJ[..., -own_CJ.shape[-1] :], 0)


scores_of.defvjp(_scores_forward, _scores_backward)
sums_of.defvjp(_sums_forward, _sums_backward)


def sinusoids(distance_L: jax.Array, size: int) -> jax.Array:
    """[sin, cos] of distance / 10000^(2i / size), `[L, size]`."""
    frequency_D = 10_000.0 ** (-jnp.arange(0, size, 2) / size)
    angle_LD = distance_L[:, None].astype(jnp.float32) * frequency_D
    return jnp.concatenate([jnp.sin(angle_LD), jnp.cos(angle_LD)], -1)


def by_distance(scores_CL: jax.Array) -> jax.Array:
    """From scores by falling distance, J - 1 to 0, to scores by key, `[..., C, J]`, J at least C.

    Key j of J is J - C + c - j tokens behind query c. What is asked of keys behind the query is
    left to the caller to mask. Rows move left by C - 1 - c: a column of zeros in front, and the
    same numbers read as rows of another length.
    """
    *lead, queries, keys = scores_CL.shape
    wide = jnp.pad(scores_CL, [(0, 0)] * (len(lead) + 1) + [(1, 0)])
    return wide.reshape(*lead, -1)[..., queries:].reshape(*lead, queries, keys)


class RelativeAttention(nnx.Module):
    """o_t = sum_j softmax_j(((q_t + u) . k_j + (q_t + v) . W_R r_{t-j}) / sqrt(K)) v_j

    r: sinusoids of the distance, at most `clamp`. Heads' outputs side by side; no projection.
    """

    def __init__(self, d_model: int, heads: int, size: int, clamp: int | None, *, rngs: nnx.Rngs):
        self.heads, self.size, self.clamp = heads, size, clamp
        wide = heads * size
        self.query, self.key, self.value, self.distance = (
            Linear(d_model, wide, rngs=rngs, axes=("heads", "embed")) for _ in range(4)
        )
        self.content_bias = nnx.Param(jnp.zeros((wide,), jnp.float32), axes=("heads",))
        self.distance_bias = nnx.Param(jnp.zeros((wide,), jnp.float32), axes=("heads",))

    def split_heads(self, x: jax.Array) -> jax.Array:
        """[..., D] to [..., H, K]."""
        return x.reshape(*x.shape[:-1], self.heads, self.size)

    def keys(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values, [..., H, K]."""
        k, v = (self.split_heads(p(x)) for p in (self.key, self.value))
        return k, v

    def frozen_keys(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The same, with no gradient to the maps."""
        return self._frozen(self.key, x), self._frozen(self.value, x)

    def frozen_queries(self, x: jax.Array) -> jax.Array:
        """Queries without their biases, with no gradient to the map."""
        return self._frozen(self.query, x)

    def _frozen(self, linear: Linear, x: jax.Array) -> jax.Array:
        return self.split_heads(dot_transposed(x, jax.lax.stop_gradient(linear.weight[...])))

    def distances(self, keys: int, dtype: jnp.dtype) -> Float[Array, "H J K"]:
        """W_R r of the distances keys - 1 to 0."""
        distance_J = jnp.arange(keys)[::-1]
        if self.clamp is not None:
            distance_J = jnp.minimum(distance_J, self.clamp)
        width = self.distance.weight.shape[1]
        r_JHK = self.split_heads(self.distance(sinusoids(distance_J, width).astype(dtype)))
        return jnp.swapaxes(r_JHK, 0, 1)

    def __call__(self, q_HCK, k_HJK, v_HJK, own_k_HJK, own_v_HJK, own_CJ, seen_CJ) -> jax.Array:
        """[..., H, C, K], of C queries that are the last of J keys; `own` as in `scores_of`."""
        keys = k_HJK.shape[-2]
        biases = (self.content_bias, self.distance_bias)
        content, place = (self.split_heads(b[...])[:, None].astype(q_HCK.dtype) for b in biases)
        r_HJK = self.distances(keys, q_HCK.dtype)
        attend = jax.checkpoint(functools.partial(_attend, self.size**-0.5))
        return attend(
            (q_HCK + content, q_HCK + place),
            r_HJK,
            (k_HJK, v_HJK),
            (own_k_HJK, own_v_HJK),
            own_CJ,
            seen_CJ,
        )


def _attend(scale: float, queries, r_HJK, pairs, own_pairs, own_CJ, seen_CJ) -> jax.Array:
    (content_HCK, place_HCK), (k_HJK, v_HJK), (own_k, own_v) = queries, pairs, own_pairs
    scores_HCJ = scores_of(content_HCK, k_HJK, own_k, own_CJ)
    scores_HCJ += by_distance(rows_dot_rows(place_HCK, jnp.broadcast_to(r_HJK, k_HJK.shape)))
    scores_HCJ = jnp.where(seen_CJ, scores_HCJ * scale, -jnp.inf)
    weight_HCJ = jax.nn.softmax(scores_HCJ, -1).astype(v_HJK.dtype)
    return sums_of(weight_HCJ, v_HJK, own_v, own_CJ).astype(v_HJK.dtype)


def check_sinusoids(config: Any, d_model: int) -> None:
    """Check that heads fit the width, unless a head_size is given, and sinusoids do."""
    if config.head_size is None:
        check_heads(config, d_model)
    rule = f"cannot have d_model={d_model}: sinusoids come in pairs; try {d_model + 1}"
    check(config, "heads", d_model % 2 == 0, rule)
