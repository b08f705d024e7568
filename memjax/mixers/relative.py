"""Attention with the relative positions of Transformer-XL."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from memjax.config import check
from memjax.layers import Linear, check_heads, dot_parted, dot_transposed
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
    d_q = dot(g_CJ, k_JK).astype(q_CK.dtype)
    d_k, d_own = (_of_keys(g, q_CK, k_JK.dtype) for g in (g_CJ, _own(g_CJ, own_CJ)))
    return d_q, d_k, d_own, None


@jax.custom_vjp
def sums_of(weight_CJ: jax.Array, v_JV: jax.Array, own_v_JV: jax.Array, own_CJ: jax.Array):
    """weight v, `[..., C, V]`, with gradients as of `scores_of`."""
    return dot(weight_CJ, v_JV)


def _sums_forward(weight_CJ, v_JV, own_v_JV, own_CJ):
    return sums_of(weight_CJ, v_JV, own_v_JV, own_CJ), (weight_CJ, v_JV, own_CJ)


def _sums_backward(residuals, g_CV):
    weight_CJ, v_JV, own_CJ = residuals
    g_CV = g_CV.astype(v_JV.dtype)
    d_weight = rows_dot_rows(g_CV, v_JV).astype(weight_CJ.dtype)
    d_v, d_own = (_of_keys(w, g_CV, v_JV.dtype) for w in (weight_CJ, _own(weight_CJ, own_CJ)))
    return d_weight, d_v, d_own, None


def _of_keys(x_CJ: jax.Array, y_CK: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """xT y, `[..., J, K]`, as the transpose of yT x, for which the smaller of them is copied."""
    return jnp.swapaxes(columns_dot_columns(y_CK, x_CJ), -1, -2).astype(dtype)


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
    """From scores by falling distance, J - 1 to -1, to scores by key, `[..., C, J]`.

    Key j of J is J - C + c - j tokens behind query c. Row c moves left by C - 1 - c: the same
    numbers read as rows that are one shorter, from place C - 1 on. What is asked of keys behind the
    query is left to the caller to mask.
    """
    *lead, queries, distances = scores_CL.shape
    size = queries * (distances - 1)
    flat = scores_CL.reshape(*lead, -1)[..., queries - 1 : queries - 1 + size]
    return flat.reshape(*lead, queries, distances - 1)


def to_distance(scores_CJ: jax.Array) -> jax.Array:
    """The transpose of `by_distance`, `[..., C, J + 1]`."""
    *lead, queries, keys = scores_CJ.shape
    widths = [(0, 0)] * len(lead) + [(queries - 1, 1)]
    flat = jnp.pad(scores_CJ.reshape(*lead, -1), widths)
    return flat.reshape(*lead, queries, keys + 1)


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

    def keys(self, x: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
        """Keys and values, [..., H, K], with a gradient to the maps; the same, with one to x."""
        parted = [
            dot_parted(x, p.weight[...], p.weight.get_metadata()["axes"])
            for p in (self.key, self.value)
        ]
        of_maps, of_x = zip(*parted)
        return [self.split_heads(y) for y in of_maps], [self.split_heads(y) for y in of_x]

    def frozen_keys(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values with no gradient to the maps."""
        return self._frozen(self.key, x), self._frozen(self.value, x)

    def frozen_queries(self, x: jax.Array) -> jax.Array:
        """Queries without their biases, with no gradient to the map."""
        return self._frozen(self.query, x)

    def _frozen(self, linear: Linear, x: jax.Array) -> jax.Array:
        return self.split_heads(dot_transposed(x, jax.lax.stop_gradient(linear.weight[...])))

    def distances(self, keys: int, dtype: jnp.dtype) -> Float[Array, "H L K"]:
        """W_R r of the distances keys - 1 to 0, and one more that no query has."""
        distance_L = jnp.maximum(jnp.arange(keys + 1)[::-1] - 1, 0)
        if self.clamp is not None:
            distance_L = jnp.minimum(distance_L, self.clamp)
        width = self.distance.weight.shape[1]
        r_LHK = self.split_heads(self.distance(sinusoids(distance_L, width).astype(dtype)))
        return jnp.swapaxes(r_LHK, 0, 1)

    def __call__(self, q_HCK, k_HJK, v_HJK, own_k_HJK, own_v_HJK, own_CJ, seen_CJ) -> jax.Array:
        """[H, ..., C, K], of C queries that are the last of J keys; `own` as in `scores_of`."""
        r_HLK = self.distances(k_HJK.shape[-2], q_HCK.dtype)
        lead = (1,) * (q_HCK.ndim - 2)

        def with_bias(bias: nnx.Param) -> jax.Array:
            bias_HK = self.split_heads(bias[...])
            return q_HCK + bias_HK.reshape(-1, *lead, self.size).astype(q_HCK.dtype)

        queries = with_bias(self.content_bias), with_bias(self.distance_bias)
        pairs, own_pairs = (k_HJK, v_HJK), (own_k_HJK, own_v_HJK)
        return _attend(self.size**-0.5, queries, r_HLK, pairs, own_pairs, own_CJ, seen_CJ)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scale: float, queries, r_HLK, pairs, own_pairs, own_CJ, seen_CJ) -> jax.Array:
    """softmax of scale (content kT + by_distance(place rT)) over the keys seen, times v.

    The backward pass makes the scores again, from the log-sum-exp: a Transformer's largest arrays
    are kept for no layer.
    """
    return _attend_forward(scale, queries, r_HLK, pairs, own_pairs, own_CJ, seen_CJ)[0]


def _scores(scale: float, queries, r_HLK, k_HJK, seen_CJ) -> jax.Array:
    content_HCK, place_HCK = queries
    scores_HCJ = rows_dot_rows(content_HCK, k_HJK)
    # Distances are the same in every block: one product a head.
    by_HFL = rows_dot_rows(_flat(place_HCK), r_HLK)
    scores_HCJ += by_distance(by_HFL.reshape(*place_HCK.shape[:-1], -1))
    return jnp.where(seen_CJ, scale * scores_HCJ, -jnp.inf)


def _flat(x_HCK: jax.Array) -> jax.Array:
    return x_HCK.reshape(x_HCK.shape[0], -1, x_HCK.shape[-1])


def _attend_forward(scale: float, queries, r_HLK, pairs, own_pairs, own_CJ, seen_CJ):
    k_HJK, v_HJK = pairs
    scores_HCJ = _scores(scale, queries, r_HLK, k_HJK, seen_CJ)
    most_HC1 = jnp.max(scores_HCJ, -1, keepdims=True)
    weight_HCJ = jnp.exp(scores_HCJ - most_HC1)
    total_HC1 = jnp.sum(weight_HCJ, -1, keepdims=True)
    o_HCK = (dot(weight_HCJ.astype(v_HJK.dtype), v_HJK) / total_HC1).astype(v_HJK.dtype)
    lse_HC1 = most_HC1 + jnp.log(total_HC1)
    return o_HCK, (queries, r_HLK, pairs, own_CJ, seen_CJ, o_HCK, lse_HC1)


def _attend_backward(scale: float, residuals, g_HCK):
    queries, r_HLK, (k_HJK, v_HJK), own_CJ, seen_CJ, o_HCK, lse_HC1 = residuals
    content_HCK, place_HCK = queries
    kind = v_HJK.dtype
    part_HC1 = jnp.sum(g_HCK * o_HCK, -1, keepdims=True, dtype=lse_HC1.dtype)
    weight_HCJ = jnp.exp(_scores(scale, queries, r_HLK, k_HJK, seen_CJ) - lse_HC1)
    d_HCJ = scale * weight_HCJ * (rows_dot_rows(g_HCK, v_HJK) - part_HC1)
    d_HCJ, weight_HCJ = d_HCJ.astype(kind), weight_HCJ.astype(kind)
    d_k, d_own_k = (_of_keys(d, content_HCK, kind) for d in (d_HCJ, _own(d_HCJ, own_CJ)))
    d_v, d_own_v = (_of_keys(w, g_HCK, kind) for w in (weight_HCJ, _own(weight_HCJ, own_CJ)))
    d_HFL = _flat(to_distance(d_HCJ))
    d_place = dot(d_HFL, r_HLK).reshape(place_HCK.shape).astype(kind)
    d_r = _of_keys(d_HFL, _flat(place_HCK), r_HLK.dtype)
    d_queries = (dot(d_HCJ, k_HJK).astype(kind), d_place)
    return d_queries, d_r, (d_k, d_v), (d_own_k, d_own_v), None, None


_attend.defvjp(_attend_forward, _attend_backward)


def check_sinusoids(config: Any, d_model: int) -> None:
    """Check that heads fit the width, unless a head_size is given, and sinusoids do."""
    if config.head_size is None:
        check_heads(config, d_model)
    rule = f"cannot have d_model={d_model}: sinusoids come in pairs; try {d_model + 1}"
    check(config, "heads", d_model % 2 == 0, rule)
