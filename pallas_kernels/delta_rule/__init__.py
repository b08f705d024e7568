"""The (gated) delta rule."""

import jax
from jaxtyping import Array, Bool, Float

from pallas_kernels import dispatch, validate
from pallas_kernels.delta_rule.chunked import delta_rule_chunked
from pallas_kernels.delta_rule.gpu import delta_rule_gpu
from pallas_kernels.delta_rule.gpu import unfit as gpu_unfit
from pallas_kernels.delta_rule.reference import delta_rule_reference
from pallas_kernels.delta_rule.tpu import delta_rule_tpu
from pallas_kernels.delta_rule.tpu import unfit as tpu_unfit

OP = "delta_rule"
IMPLEMENTATIONS = {
    "reference": delta_rule_reference,
    "xla": delta_rule_chunked,
    "tpu": delta_rule_tpu,
    "gpu": delta_rule_gpu,
}


def delta_rule(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    reset: Bool[Array, "B T"] | None = None,
    *,
    scale: float | None = None,
    chunk: int = 32,
    impl: str = "auto",
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """A matrix memory that decays, reads what it holds under a key, and writes the difference.

        S  = diag(exp(log_decay_t)) S_{t-1}
        S_t = S + k_t (beta_t (v_t - ST k_t))T
        o_t = scale S_tT q_t

    Shapes: q, k `[B, T, H, K]`; v and o `[B, T, H, V]`; beta `[B, T, H]`; log_decay None (no
    decay), `[B, T, H]` (one decay a head) or `[B, T, H, K]` (one a key channel); state
    `[B, H, K, V]`, zeros if None; reset `[B, T]`.
    Units: log_decay is a natural logarithm, at most 0; beta is a write strength in [0, 2], and a
    key has a norm of at most 1: outside, the state may grow without bound. Neither is checked.
    `scale` None means K**-0.5.
    A true `reset` at t sets the state before token t to zero: neither values nor gradients cross.
    Any T from 1. `chunk` (tokens a tile, rounded up to a power of two) changes the speed alone; 32
    is the fastest measured on a CPU.
    Returns o in the dtype of q and the state after the last token, float32 (float64 if q, k or v
    is). Differentiable in every floating argument. Everything but the products of q and k with k is
    computed in float32, for bfloat16 inputs too. Decays below exp(-800), minus infinity included,
    count as 0.
    Errors: ValueError for shapes or dtypes that disagree, chunk < 1, a positive log_decay (where
    its values are known), or an implementation that is not available.
    Source: arXiv:2406.06484 (no decay), arXiv:2412.06464 (per head), arXiv:2510.26692 (per
    channel).
    """
    validate.check_axes(
        OP,
        q=(q, "BTHK"),
        k=(k, "BTHK"),
        v=(v, "BTHV"),
        beta=(beta, "BTH"),
        log_decay=(log_decay, validate.decay_axes(log_decay)),
        initial_state=(initial_state, "BHKV"),
        reset=(reset, "BT"),
    )
    validate.check_floating(
        OP, q=q, k=k, v=v, beta=beta, log_decay=log_decay, initial_state=initial_state
    )
    validate.check_reset(OP, reset)
    validate.check_tokens(OP, q.shape[1])
    validate.check_at_least_one(OP, chunk=chunk)
    validate.check_log_decay(OP, log_decay)
    unfit = {
        "tpu": lambda: tpu_unfit(q, k, v, chunk=chunk),
        "gpu": lambda: gpu_unfit(q, k, v, log_decay),
    }
    chosen = dispatch.resolve(OP, impl, unfit)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with jax.named_scope(f"{OP}_{chosen}"):
        return IMPLEMENTATIONS[chosen](
            q, k, v, beta, log_decay, initial_state, reset, scale=scale, chunk=chunk
        )
