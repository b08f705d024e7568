"""The selective scan of Mamba."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels import dispatch, validate
from pallas_kernels.selective_scan.chunked import selective_scan_chunked
from pallas_kernels.selective_scan.reference import selective_scan_reference
from pallas_kernels.selective_scan.tpu import selective_scan_tpu, unfit

OP = "selective_scan"
IMPLEMENTATIONS = {
    "reference": selective_scan_reference,
    "xla": selective_scan_chunked,
    "tpu": selective_scan_tpu,
}


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
    chunk: int = 32,
    impl: str = "auto",
) -> tuple[Float[Array, "B T E"], Float[Array, "B E N"]]:
    """N leaky sums a channel, which every token fades, writes and reads by its own choice.

        h_t = exp(dt_t A) h_{t-1} + (dt_t x_t) B_tT
        y_t = h_t C_t + D x_t

    Shapes: x, dt and y `[B, T, E]`; A `[E, N]`; B, C `[B, T, N]`; D `[E]`, no such term if None;
    state `[B, E, N]`, zeros if None; reset `[B, T]`.
    Units: dt is a length of time, at least 0 (after its softplus); A is a rate, at most 0.
    A true `reset` at t sets the state before token t to zero: neither values nor gradients cross.
    Any T from 1. `chunk` changes speed and memory alone: the backward pass keeps the state at the
    start of every chunk and computes those inside again, so that `[B, T, E, N]` is never whole.
    Returns y in the dtype of x and the state after the last token, float32 (float64 if an input
    is). Differentiable in every floating argument. All is computed in float32, for bfloat16 inputs
    too.
    Errors: ValueError for shapes or dtypes that disagree, chunk < 1, a positive A or a negative dt
    (where values are known), or an implementation that is not available.
    Source: arXiv:2312.00752, Algorithm 2 and Sec. 3.2 (A by zero-order hold, B by Euler's rule).
    """
    validate.check_axes(
        OP,
        x=(x, "BTE"),
        dt=(dt, "BTE"),
        A=(A, "EN"),
        B=(B, "BTN"),
        C=(C, "BTN"),
        D=(D, "E"),
        initial_state=(initial_state, "BEN"),
        reset=(reset, "BT"),
    )
    validate.check_floating(OP, x=x, dt=dt, A=A, B=B, C=C, D=D, initial_state=initial_state)
    validate.check_reset(OP, reset)
    validate.check_tokens(OP, x.shape[1])
    validate.check_at_least_one(OP, chunk=chunk)
    _check_signs(dt, A)
    chosen = dispatch.resolve(OP, impl, {"tpu": lambda: unfit(x, dt, A, B, C, chunk=chunk)})
    with jax.named_scope(f"{OP}_{chosen}"):
        return IMPLEMENTATIONS[chosen](x, dt, A, B, C, D, initial_state, reset, chunk=chunk)


def _check_signs(dt: jax.Array, A: jax.Array) -> None:
    """Time runs forward and states fade. Values of traced arrays are not known and not checked."""
    if not isinstance(dt, jax.core.Tracer) and not (shortest := float(jnp.min(dt))) >= 0:
        raise ValueError(f"{OP}: dt has a value of {shortest:g}; it must be at least 0")
    if not isinstance(A, jax.core.Tracer) and not (largest := float(jnp.max(A))) <= 0:
        raise ValueError(f"{OP}: A has a value of {largest:g}; it must be at most 0")
