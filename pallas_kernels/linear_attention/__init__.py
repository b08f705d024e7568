"""Gated linear attention."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels import dispatch, validate
from pallas_kernels.linear_attention.chunked import linear_attention_chunked
from pallas_kernels.linear_attention.gpu import linear_attention_gpu
from pallas_kernels.linear_attention.gpu import unfit as gpu_unfit
from pallas_kernels.linear_attention.reference import linear_attention_reference
from pallas_kernels.linear_attention.tpu import linear_attention_tpu
from pallas_kernels.linear_attention.tpu import unfit as tpu_unfit

OP = "linear_attention"
IMPLEMENTATIONS = {
    "reference": linear_attention_reference,
    "xla": linear_attention_chunked,
    "tpu": linear_attention_tpu,
    "gpu": linear_attention_gpu,
}


def linear_attention(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    reset: Bool[Array, "B T"] | None = None,
    *,
    scale: float | None = None,
    chunk: int = 64,
    impl: str = "auto",
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """A matrix memory with additive writes and a decay.

        S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_tT
        o_t = scale S_tT q_t

    Shapes: q, k `[B, T, G, K]`; v and o `[B, T, H, V]`; log_decay None (no decay), `[B, T, H]`
    (one decay a head) or `[B, T, H, K]` (one a key channel); state `[B, H, K, V]`, zeros if None;
    reset `[B, T]`. G must divide H: H / G heads in a row share a query and a key, not a decay.
    Units: log_decay is a natural logarithm, at most 0; `scale` None means K**-0.5.
    A true `reset` at t sets the state before token t to zero: neither values nor gradients cross.
    Any T from 1. `chunk` (tokens a tile, rounded up to a power of two) changes the speed alone.
    Returns o in the dtype of q and the state after the last token, float32 (float64 if q, k or v
    is). Differentiable in every floating argument. Inputs in bfloat16 are multiplied in bfloat16
    and accumulated in float32; decays and states are float32. Decays below exp(-800), minus
    infinity included, count as 0.
    Errors: ValueError for shapes or dtypes that disagree, chunk < 1, a positive log_decay (where
    its values are known), or an implementation that is not available.
    Source: arXiv:2006.16236 (no decay), arXiv:2307.08621 (per head), arXiv:2312.06635 (per
    channel).
    """
    validate.check_axes(
        OP,
        q=(q, "BTGK"),
        k=(k, "BTGK"),
        v=(v, "BTHV"),
        log_decay=(log_decay, validate.decay_axes(log_decay)),
        initial_state=(initial_state, "BHKV"),
        reset=(reset, "BT"),
    )
    validate.check_floating(OP, q=q, k=k, v=v, log_decay=log_decay, initial_state=initial_state)
    validate.check_groups(OP, q.shape[2], v.shape[2])
    validate.check_reset(OP, reset)
    validate.check_tokens(OP, q.shape[1])
    validate.check_at_least_one(OP, chunk=chunk)
    validate.check_log_decay(OP, log_decay)
    per_channel = log_decay is not None and log_decay.ndim == 4
    unfit = {
        "tpu": lambda: tpu_unfit(q, k, v, chunk=chunk),
        "gpu": lambda: gpu_unfit(q, k, v, log_decay, scale=scale),
    }
    chosen = dispatch.resolve(OP, impl, unfit)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if q.shape[2] < v.shape[2] and (chosen not in ("xla", "gpu") or per_channel):
        q, k = (jnp.repeat(x, v.shape[2] // x.shape[2], 2) for x in (q, k))
    with jax.named_scope(f"{OP}_{chosen}"):
        return IMPLEMENTATIONS[chosen](
            q, k, v, log_decay, initial_state, reset, scale=scale, chunk=chunk
        )
