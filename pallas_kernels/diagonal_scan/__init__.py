"""The diagonal scan: a leaky sum in every channel."""

import jax
from jaxtyping import Array, Bool, Float

from pallas_kernels import dispatch, validate
from pallas_kernels.diagonal_scan import tpu
from pallas_kernels.diagonal_scan.chunked import diagonal_scan_chunked
from pallas_kernels.diagonal_scan.reference import diagonal_scan_reference

OP = "diagonal_scan"
IMPLEMENTATIONS = {
    "reference": diagonal_scan_reference,
    "xla": diagonal_scan_chunked,
    "tpu": tpu.diagonal_scan_tpu,
}


def diagonal_scan(
    x: Float[Array, "B T E"],
    log_decay: Float[Array, "B T E"],
    initial_state: Float[Array, "B E"] | None = None,
    reset: Bool[Array, "B T"] | None = None,
    *,
    chunk: int = 64,
    impl: str = "auto",
) -> tuple[Float[Array, "B T E"], Float[Array, "B E"]]:
    """Every channel fades by itself and adds its input.

        h_t = exp(log_decay_t) h_{t-1} + x_t

    Shapes: x, log_decay and h `[B, T, E]`; state `[B, E]`, zeros if None; reset `[B, T]`.
    Units: log_decay is a natural logarithm, at most 0; minus infinity forgets everything.
    A true `reset` at t sets the state before token t to zero: neither values nor gradients cross.
    Any T from 1. `chunk` (tokens a tile) changes the speed alone.
    Returns h in the dtype of x and the state after the last token, float32 (float64 if an input
    is). Differentiable in every floating argument. All is computed in float32, for bfloat16 inputs
    too, where a decay has an error of up to 3e-8: after T tokens with decays near 1, T times that.
    Errors: ValueError for shapes or dtypes that disagree, chunk < 1, a positive log_decay (where
    its values are known), or an implementation that is not available.
    Source: arXiv:2402.19427, Eq. 4, without the gates.
    """
    validate.check_axes(
        OP,
        x=(x, "BTE"),
        log_decay=(log_decay, "BTE"),
        initial_state=(initial_state, "BE"),
        reset=(reset, "BT"),
    )
    validate.check_floating(OP, x=x, log_decay=log_decay, initial_state=initial_state)
    validate.check_reset(OP, reset)
    validate.check_tokens(OP, x.shape[1])
    validate.check_at_least_one(OP, chunk=chunk)
    validate.check_log_decay(OP, log_decay)
    unfit = {"tpu": lambda: tpu.unfit(x, log_decay, chunk=chunk)}
    chosen = dispatch.resolve(OP, impl, unfit)
    with jax.named_scope(f"{OP}_{chosen}"):
        return IMPLEMENTATIONS[chosen](x, log_decay, initial_state, reset, chunk=chunk)
