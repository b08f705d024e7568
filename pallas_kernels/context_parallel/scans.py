"""More recurrences over a sharded sequence, by summaries of shards.

The shard is read from a zero state for its summary. What a state that enters adds to the outputs
is then added where that is a product, and found by reading the shard again where it is not.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_kernels.chunks import LOG_DECAY_FLOOR
from pallas_kernels.context_parallel.affine import fold
from pallas_kernels.context_parallel.tokens import same_everywhere
from pallas_kernels.diagonal_scan import diagonal_scan as whole_diagonal_scan
from pallas_kernels.mlstm import MLSTMMemory
from pallas_kernels.mlstm import mlstm as whole_mlstm
from pallas_kernels.products import accumulation_dtype
from pallas_kernels.taylor_attention import feature_count
from pallas_kernels.taylor_attention import taylor_attention as whole_taylor_attention


def diagonal_scan(
    x: Float[Array, "B T E"],
    log_decay: Float[Array, "B T E"],
    initial_state: Float[Array, "B E"] | None = None,
    reset: Bool[Array, "B T"] | None = None,
    *,
    axis_name: str,
    chunk: int = 64,
    impl: str = "auto",
) -> tuple[Float[Array, "B T E"], Float[Array, "B E"]]:
    """`pallas_kernels.diagonal_scan` of a sequence sharded over `axis_name`.

        h_t = exp(G_t) h_in + h_t from zero

    with G the sums of log decay in the shard, up to the first reset. Every device gathers n
    summaries of 2 E numbers.
    """
    dtype = accumulation_dtype(x, log_decay)
    wide = x.astype(dtype)
    nothing_BE = jnp.zeros_like(wide[:, 0])
    settings: dict[str, Any] = {"chunk": chunk, "impl": impl}
    h_BTE, written_BE = whole_diagonal_scan(wide, log_decay, nothing_BE, reset, **settings)
    sums_BTE = jnp.cumsum(jnp.maximum(log_decay.astype(dtype), LOG_DECAY_FLOOR), axis=1)
    enter_BTE = jnp.exp(jnp.where(_open(reset, x)[..., None], sums_BTE, -jnp.inf))

    def apply(summary, state_BE):
        through_BE, written_BE = summary
        return through_BE * state_BE + written_BE

    state_BE = _initial(initial_state, nothing_BE)
    entering_BE, last_BE = fold(apply, (enter_BTE[:, -1], written_BE), state_BE, axis_name)
    return (h_BTE + enter_BTE * entering_BE[:, None]).astype(x.dtype), last_BE


def taylor_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    initial_state: Float[Array, "B H M W"] | None = None,
    reset: Bool[Array, "B T"] | None = None,
    *,
    axis_name: str,
    scale: float | None = None,
    chunk: int = 128,
    impl: str = "auto",
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H M W"]]:
    """`pallas_kernels.taylor_attention` of a sequence sharded over `axis_name`.

    States add up, up to the last reset. The shard is read twice: for its summary, and from the
    state that enters it. Every device gathers n states.
    """
    batch, _, heads, size = q.shape
    dtype = accumulation_dtype(q, k, v)
    shape = (batch, heads, feature_count(size), v.shape[-1] + 1)
    nothing_BHMW = same_everywhere(jnp.zeros(shape, dtype), v)
    settings: dict[str, Any] = {"scale": scale, "chunk": chunk, "impl": impl}
    _, written_BHMW = whole_taylor_attention(q, k, v, nothing_BHMW, reset, **settings)

    def apply(summary, state_BHMW):
        open_B, written_BHMW = summary
        return jnp.where(open_B[:, None, None, None], state_BHMW, 0) + written_BHMW

    state_BHMW = _initial(initial_state, nothing_BHMW)
    summary = (_open(reset, q)[:, -1], written_BHMW)
    entering_BHMW, last_BHMW = fold(apply, summary, state_BHMW, axis_name)
    o_BTHV, _ = whole_taylor_attention(q, k, v, entering_BHMW, reset, **settings)
    return o_BTHV, last_BHMW


def mlstm(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    log_input: Float[Array, "B T H"],
    log_forget: Float[Array, "B T H"],
    initial_state: MLSTMMemory | None = None,
    reset: Bool[Array, "B T"] | None = None,
    *,
    axis_name: str,
    scale: float | None = None,
    chunk: int = 64,
    impl: str = "auto",
) -> tuple[Float[Array, "B T H V"], MLSTMMemory]:
    """`pallas_kernels.mlstm` of a sequence sharded over `axis_name`.

    With F the sum of log forget over the shard, m' = max(F + m, m_s) and (C_s, n_s, m_s) the state
    of the shard from zero, what leaves it is

        C' = exp(F + m - m') C + exp(m_s - m') C_s,   n' likewise

    The shard is read twice: for its summary, and from the state that enters it. As there, levels
    are constants to the gradient, but the initial one. Every device gathers n states.
    """
    batch, _, heads, key_size = q.shape
    dtype = accumulation_dtype(q, k, v)
    shapes = (batch, heads, key_size, v.shape[-1]), (batch, heads, key_size), (batch, heads)
    zeros = (jnp.zeros(shape, dtype) for shape in shapes)
    nothing = MLSTMMemory(*same_everywhere(tuple(zeros), v))
    settings: dict[str, Any] = {"scale": scale, "chunk": chunk, "impl": impl}
    streams = (q, k, v, log_input, log_forget)
    _, written = whole_mlstm(*streams, nothing, reset, **settings)
    forget_BH = jnp.sum(log_forget.astype(dtype), axis=1)
    forget_BH = jnp.where(_open(reset, q)[:, -1, None], forget_BH, -jnp.inf)

    def apply(summary, state):
        forget_BH, (memory, normaliser, level) = summary
        kept_BH = forget_BH + state.level_BH
        level_BH = lax.stop_gradient(jnp.maximum(kept_BH, level))
        keep_BH, add_BH = jnp.exp(kept_BH - level_BH), jnp.exp(level - level_BH)
        return MLSTMMemory(
            keep_BH[..., None, None] * state.memory_BHKV + add_BH[..., None, None] * memory,
            keep_BH[..., None] * state.normaliser_BHK + add_BH[..., None] * normaliser,
            level_BH,
        )

    written = written._replace(level_BH=lax.stop_gradient(written.level_BH))
    state = nothing if initial_state is None else initial_state
    state = MLSTMMemory(*(_initial(part, zero) for part, zero in zip(state, nothing)))
    entering, last = fold(apply, (forget_BH, written), state, axis_name)
    h_BTHV, _ = whole_mlstm(*streams, entering, reset, **settings)
    return h_BTHV, last


def _open(reset_BT: jax.Array | None, x_BT: jax.Array) -> jax.Array:
    """Where the document of the entering state still goes on, `[B, T]`."""
    if reset_BT is None:
        return jnp.ones(x_BT.shape[:2], bool)
    return jnp.cumsum(reset_BT.astype(jnp.int32), axis=1) == 0


def _initial(initial_state: jax.Array | None, nothing: jax.Array) -> jax.Array:
    if initial_state is None:
        return nothing
    return same_everywhere(initial_state.astype(nothing.dtype), nothing)
