"""Linear recurrences over a sharded sequence, by affine summaries of shards."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_kernels.chunks import LOG_DECAY_FLOOR
from pallas_kernels.context_parallel.tokens import of_last, same_everywhere
from pallas_kernels.context_parallel.twice import Plan, read_twice
from pallas_kernels.delta_rule import delta_rule as whole_delta_rule
from pallas_kernels.linear_attention import linear_attention as whole_linear_attention
from pallas_kernels.products import accumulation_dtype
from pallas_kernels.selective_scan import selective_scan as whole_selective_scan


def linear_attention(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    reset: Bool[Array, "B T"] | None = None,
    *,
    axis_name: str,
    scale: float | None = None,
    chunk: int = 64,
    impl: str = "auto",
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """`pallas_kernels.linear_attention` of a sequence sharded over `axis_name`.

        S_t = exp(G_t) S_in + S_t from zero;  S_out = exp(G_T) S_in + B

    G are sums of log decay from the start of the shard; the summary is (exp(G_T), B). After a reset
    exp(G) counts as 0. Every device gathers n summaries of K + K V numbers a head.
    """
    batch, tokens, heads, value_size = v.shape
    key_size = q.shape[-1]
    dtype = accumulation_dtype(q, k, v)
    scale = key_size**-0.5 if scale is None else scale
    nothing_BHKV = _zeros((batch, heads, key_size, value_size), dtype, v)
    o_BTHV, written_BHKV = whole_linear_attention(
        q, k, v, log_decay, nothing_BHKV, reset, scale=scale, chunk=chunk, impl=impl
    )
    sums = _zeros((batch, tokens, heads, 1), dtype, v)
    if log_decay is not None:
        sums = log_decay[..., None] if log_decay.ndim == 3 else log_decay
        sums = jnp.cumsum(jnp.maximum(sums.astype(dtype), LOG_DECAY_FLOOR), axis=1)
    enter_BTHK = _before_reset(sums, reset)
    through_BHK1 = jnp.swapaxes(enter_BTHK[:, -1, :, None, :], -1, -2)

    def apply(summary, state_BHKV):
        through_BHK1, written_BHKV = summary
        return through_BHK1 * state_BHKV + written_BHKV

    state_BHKV = _initial(initial_state, nothing_BHKV)
    summary = (through_BHK1, written_BHKV)
    entering_BHKV, last_BHKV = fold(apply, summary, state_BHKV, axis_name)
    q_BTHK = jnp.repeat(q, heads // q.shape[2], axis=2)
    read = (q_BTHK * enter_BTHK).astype(q.dtype)
    o_BTHV = o_BTHV + scale * _read(read, entering_BHKV, dtype)
    return o_BTHV.astype(q.dtype), last_BHKV


def delta_rule(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    reset: Bool[Array, "B T"] | None = None,
    *,
    axis_name: str,
    scale: float | None = None,
    chunk: int = 32,
    impl: str = "auto",
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """`pallas_kernels.delta_rule` of a sequence sharded over `axis_name`.

        S_t = A_t S_in + B_t,   A_t = prod (I - beta k kT) diag(exp(log_decay))

    A_t obeys the same rule with v = 0, from A = I, so one call with [v, 0] from [0, I] gives both
    parts, and o_t = scale B_tT q_t + S_inT (scale A_tT q_t). Every device gathers n summaries of
    K (K + V) numbers a head.
    """
    batch, _, heads, value_size = v.shape
    key_size = q.shape[-1]
    dtype = accumulation_dtype(q, k, v)
    if log_decay is None:  # the check of jax.shard_map wants every input of its backward pass split
        log_decay = _zeros(beta.shape, dtype, v)
    values = jnp.concatenate([v, jnp.zeros_like(k, dtype=v.dtype)], axis=-1)
    nothing_BHKV = _zeros((batch, heads, key_size, value_size), dtype, v)
    unit = jnp.broadcast_to(jnp.eye(key_size, dtype=dtype), (batch, heads, key_size, key_size))
    start = jnp.concatenate([nothing_BHKV, same_everywhere(unit, v)], axis=-1)
    both, after = whole_delta_rule(
        q, k, values, beta, log_decay, start, reset, scale=scale, chunk=chunk, impl=impl
    )
    o_BTHV, read_BTHK = both[..., :value_size], both[..., value_size:]

    def apply(summary, state_BHKV):
        carried = jnp.einsum(
            "bhkl,bhlv->bhkv", summary[..., value_size:], state_BHKV, precision="highest"
        )
        return carried + summary[..., :value_size]

    state_BHKV = _initial(initial_state, nothing_BHKV)
    entering_BHKV, last_BHKV = fold(apply, after, state_BHKV, axis_name)
    return (o_BTHV + _read(read_BTHK, entering_BHKV, dtype)).astype(q.dtype), last_BHKV


def selective_scan(
    x: Float[Array, "B T E"],
    dt: Float[Array, "B T E"],
    A: Float[Array, "E N"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    D: Float[Array, "E"] | None = None,
    initial_state: Float[Array, "B E N"] | None = None,
    reset: Bool[Array, "B T"] | None = None,
    *,
    axis_name: str,
    chunk: int = 64,
    impl: str = "auto",
) -> tuple[Float[Array, "B T E"], Float[Array, "B E N"]]:
    """`pallas_kernels.selective_scan` of a sequence sharded over `axis_name`.

        h_t = exp(A sum dt) h_in + h_t from zero

    The shard is scanned twice, forwards and backwards: for its summary, and from the state that
    enters it (`twice`). Every device gathers n summaries of 2 E N numbers.
    """
    dtype = accumulation_dtype(x, dt)
    nothing_BEN = _zeros((x.shape[0], *A.shape), dtype, x)
    A, D = same_everywhere((A, D), x)
    read = partial(_read_scan, chunk, impl)
    streams = _Scan(x, dt, A, B, C, D, reset)
    state_BEN = _initial(initial_state, nothing_BEN)
    y_BTE, after_BEN = read_twice(Plan(read, _through_scan, axis_name), streams, state_BEN)
    return y_BTE, of_last(after_BEN, axis_name)


class _Scan(NamedTuple):
    """The arguments of a selective scan but its state."""

    x_BTE: jax.Array
    dt_BTE: jax.Array
    A_EN: jax.Array
    B_BTN: jax.Array
    C_BTN: jax.Array
    D_E: jax.Array | None
    reset_BT: jax.Array | None


def _read_scan(chunk: int, impl: str, streams: _Scan, state_BEN: jax.Array):
    x, dt, A, B, C, D, reset = streams
    return whole_selective_scan(x, dt, A, B, C, D, state_BEN, reset, chunk=chunk, impl=impl)


def _through_scan(streams: _Scan) -> jax.Array:
    """exp(A sum dt), and 0 where there is a reset."""
    sum_BE = jnp.sum(streams.dt_BTE, axis=1, dtype=accumulation_dtype(streams[0], streams[1]))
    exponent_BEN = sum_BE[..., None] * streams.A_EN.astype(sum_BE.dtype)
    if streams.reset_BT is not None:
        exponent_BEN = jnp.where(
            jnp.any(streams.reset_BT, axis=1)[:, None, None], -jnp.inf, exponent_BEN
        )
    return jnp.exp(exponent_BEN)


def _zeros(shape: tuple[int, ...], dtype, like: jax.Array) -> jax.Array:
    return same_everywhere(jnp.zeros(shape, dtype), like)


def _initial(initial_state: jax.Array | None, nothing: jax.Array) -> jax.Array:
    if initial_state is None:
        return nothing
    return same_everywhere(initial_state.astype(nothing.dtype), nothing)


def _before_reset(sums_BTHK: jax.Array, reset_BT: jax.Array | None) -> jax.Array:
    """exp of sums, and 0 from the first reset of the shard on."""
    if reset_BT is None:
        return jnp.exp(sums_BTHK)
    open_BT = jnp.cumsum(reset_BT.astype(jnp.int32), axis=1) == 0
    return jnp.exp(jnp.where(open_BT[:, :, None, None], sums_BTHK, -jnp.inf))


def _read(q_BTHK: jax.Array, state_BHKV: jax.Array, dtype) -> jax.Array:
    state_BHKV = state_BHKV.astype(q_BTHK.dtype)
    return jnp.einsum("bthk,bhkv->bthv", q_BTHK, state_BHKV, preferred_element_type=dtype)


def fold(apply, summary, state, axis_name: str):
    """The state that enters this shard, and the one behind the last, the same on all devices."""
    me = lax.axis_index(axis_name)
    summaries = lax.all_gather(summary, axis_name)

    def one_shard(state, indexed):
        index, summary = indexed
        after = apply(summary, state)
        return jax.tree.map(lambda x, y: jnp.where(index < me, x, y), after, state), None

    size = lax.axis_size(axis_name)
    entering, _ = lax.scan(one_shard, state, (jnp.arange(size), summaries))
    return entering, of_last(apply(summary, entering), axis_name)
