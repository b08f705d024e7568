"""The memory of the mLSTM: exponential input gates, and a normaliser."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels import dispatch, products, validate
from pallas_kernels.mlstm import gpu, tpu
from pallas_kernels.mlstm.chunked import mlstm_chunked
from pallas_kernels.mlstm.reference import mlstm_reference

OP = "mlstm"
IMPLEMENTATIONS = {
    "reference": mlstm_reference,
    "xla": mlstm_chunked,
    "tpu": tpu.mlstm_tpu,
    "gpu": gpu.mlstm_gpu,
}


class MLSTMMemory(NamedTuple):
    """What is held is exp(level) memory and exp(level) normaliser. float32 (or float64)."""

    memory_BHKV: Float[Array, "B H K V"]
    normaliser_BHK: Float[Array, "B H K"]
    level_BH: Float[Array, "B H"]


def mlstm(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    log_input: Float[Array, "B T H"],
    log_forget: Float[Array, "B T H"],
    initial_state: MLSTMMemory | None = None,
    reset: Bool[Array, "B T"] | None = None,
    *,
    scale: float | None = None,
    chunk: int = 64,
    impl: str = "auto",
) -> tuple[Float[Array, "B T H V"], MLSTMMemory]:
    """A matrix memory with an exponential input gate, read relative to what was written.

        m_t = max(log_forget_t + m_{t-1}, log_input_t, 0)
        C_t = exp(log_forget_t + m_{t-1} - m_t) C_{t-1} + exp(log_input_t - m_t) k_t v_tT
        n_t = exp(log_forget_t + m_{t-1} - m_t) n_{t-1} + exp(log_input_t - m_t) k_t
        h_t = scale C_tT q_t / max(|scale n_tT q_t|, exp(-m_t))

    Shapes: q, k `[B, T, H, K]`; v and h `[B, T, H, V]`; log_input, log_forget `[B, T, H]`; state
    (C, n, m) = `MLSTMMemory`, zeros if None; reset `[B, T]`.
    Units: logarithms are natural; log_forget is at most 0; `scale` None means K**-0.5.
    The level m cancels: h depends on exp(m) C and exp(m) n alone, wherever m starts. The gradient
    therefore takes every level for a constant but the initial one, and is exact for h and for what
    the state holds; none comes out of the last level.
    A true `reset` at t sets the state before token t to zero: neither values nor gradients cross.
    Any T from 1. `chunk` (tokens a tile, rounded up to a power of two) changes the speed alone.
    Returns h in the dtype of q and the state after the last token. Inputs in bfloat16 are
    multiplied in bfloat16 and accumulated in float32; gates and states are float32.
    Errors: ValueError for shapes or dtypes that disagree, chunk < 1, a positive log_forget (where
    its values are known), or an implementation that is not available.
    Source: arXiv:2405.04517, Eqs. 15 and 19 to 27.
    Differs from paper: m is at least 0. Nothing is lost by it, for h is at most scale CT q where m
    would be less, and exp(-m) cannot overflow. The divisor is at least 1e-18.
    """
    state = initial_state
    validate.check_axes(
        OP,
        q=(q, "BTHK"),
        k=(k, "BTHK"),
        v=(v, "BTHV"),
        log_input=(log_input, "BTH"),
        log_forget=(log_forget, "BTH"),
        memory=(None if state is None else state.memory_BHKV, "BHKV"),
        normaliser=(None if state is None else state.normaliser_BHK, "BHK"),
        level=(None if state is None else state.level_BH, "BH"),
        reset=(reset, "BT"),
    )
    validate.check_floating(OP, q=q, k=k, v=v, log_input=log_input, log_forget=log_forget)
    validate.check_reset(OP, reset)
    validate.check_tokens(OP, q.shape[1])
    validate.check_at_least_one(OP, chunk=chunk)
    validate.check_log_decay(OP, log_forget, "log_forget")
    unfit = {
        "tpu": lambda: tpu.unfit(q, k, v, chunk=chunk),
        "gpu": lambda: gpu.unfit(q, k, v, scale=scale),
    }
    chosen = dispatch.resolve(OP, impl, unfit)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = products.accumulation_dtype(q, k, v)
    if state is None:
        batch, _, heads, key_size = q.shape
        state = MLSTMMemory(
            jnp.zeros((batch, heads, key_size, v.shape[-1]), dtype),
            jnp.zeros((batch, heads, key_size), dtype),
            jnp.zeros((batch, heads), dtype),
        )
    log_input, log_forget = log_input.astype(dtype), log_forget.astype(dtype)
    held = tuple(part.astype(dtype) for part in state)
    if reset is None:
        reset = jnp.zeros(q.shape[:2], bool)
    with jax.named_scope(f"{OP}_{chosen}"):
        h, held = IMPLEMENTATIONS[chosen](
            q, k, v, log_input, log_forget, held, reset, scale=scale, chunk=chunk
        )
    return h, MLSTMMemory(*held)
