"""Linear attention with the second-order Taylor series of the exponential."""

import jax
from jaxtyping import Array, Bool, Float

from pallas_kernels import dispatch, validate
from pallas_kernels.taylor_attention import tpu
from pallas_kernels.taylor_attention.chunked import taylor_attention_chunked
from pallas_kernels.taylor_attention.features import feature_count, taylor_features
from pallas_kernels.taylor_attention.reference import taylor_attention_reference

__all__ = ["feature_count", "taylor_attention", "taylor_features"]

OP = "taylor_attention"
IMPLEMENTATIONS = {
    "reference": taylor_attention_reference,
    "xla": taylor_attention_chunked,
    "tpu": tpu.taylor_attention_tpu,
}


def taylor_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    initial_state: Float[Array, "B H M W"] | None = None,
    reset: Bool[Array, "B T"] | None = None,
    *,
    scale: float | None = None,
    chunk: int = 128,
    impl: str = "auto",
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H M W"]]:
    """Attention whose weights are a series of the exponential, so that a matrix remembers them.

        w_tj = 1 + s_tj + s_tj^2 / 2,   s_tj = scale q_t . k_j   (at least 1/2)
        o_t  = sum_{j <= t} w_tj v_j / sum_{j <= t} w_tj

    which is, with phi = `taylor_features` (1 + s + s^2 / 2 = phi(scale q) . phi(k)),

        S_t = S_{t-1} + phi(k_t) [v_t, 1]T;   o_t = the first V of ST phi(scale q_t), over the last

    Shapes: q, k `[B, T, H, K]`; v and o `[B, T, H, V]`; state `[B, H, M, V + 1]` with
    M = `feature_count(K)`, zeros if None; reset `[B, T]`.
    Units: `scale` None means K**-0.5.
    A true `reset` at t sets the state before token t to zero: neither values nor gradients cross.
    Any T from 1. `chunk` (tokens a tile, rounded up to a power of two) changes the speed alone;
    features are made only for the state, so a long tile costs less than in linear attention.
    Returns o in the dtype of q and the state after the last token, float32 (float64 if q, k or v
    is). Differentiable in every floating argument. Inputs in bfloat16 are multiplied in bfloat16
    and accumulated in float32; features and states are float32.
    Errors: ValueError for shapes or dtypes that disagree, chunk < 1, or an implementation that is
    not available.
    Source: arXiv:2402.18668, Sec. 4.1.
    Differs from paper: the M features hold each of the K^2 products of two channels once, which
    halves the state; the sum of weights, at least 1/2, needs no epsilon.
    """
    validate.check_axes(OP, q=(q, "BTHK"), k=(k, "BTHK"), v=(v, "BTHV"), reset=(reset, "BT"))
    batch, tokens, heads, size = q.shape
    want = (batch, heads, feature_count(size), v.shape[-1] + 1)
    if initial_state is not None and initial_state.shape != want:
        raise ValueError(
            f"{OP}: initial_state has shape {initial_state.shape}; it must be {want}: "
            "[B, H, feature_count(K), V + 1]"
        )
    validate.check_floating(OP, q=q, k=k, v=v, initial_state=initial_state)
    validate.check_reset(OP, reset)
    validate.check_tokens(OP, tokens)
    validate.check_at_least_one(OP, chunk=chunk)
    unfit = {"tpu": lambda: tpu.unfit(q, k, v, chunk=chunk)}
    chosen = dispatch.resolve(OP, impl, unfit)
    scale = size**-0.5 if scale is None else scale
    with jax.named_scope(f"{OP}_{chosen}"):
        return IMPLEMENTATIONS[chosen](q, k, v, initial_state, reset, scale=scale, chunk=chunk)
