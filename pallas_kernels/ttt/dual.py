"""Test-time training in its dual form: no weights of single tokens.

With g_j the gradients of the loss at the memory's output, all at the weights W, c that entered the
block, token i reads

    q_i W_i + c_i = q_i W + c - place_rate_i sum_{j <= i} rate_j (q_i . k_j + 1) g_j

Only the g_j and the update of the weights wait for the previous block.

Everything is a matrix of the last two axes, so that the same lines run on all heads at once and on
one inside a kernel: biases and norms are rows `[..., 1, K]`, and products are those of a `Maths`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.products import Maths, earlier, last_row
from pallas_kernels.ttt.rule import EPSILON, LinearMemory, MLPMemory, Norm, normalise


class Prepared(NamedTuple):
    """What of a block does not depend on the memory."""

    q_CK: jax.Array
    k_CK: jax.Array
    target_CK: jax.Array
    step_CC: jax.Array  # rate of token j for token i; 0 where j is later
    last_C1: jax.Array  # rate of token j for the next block
    scores_CC: jax.Array  # step (q_i . k_j + 1)


def prepare(maths: Maths, place_rate_C1, rate_1C, q_CK, k_CK, v_CK) -> Prepared:
    step_CC = earlier(place_rate_C1 * rate_1C)
    scores_CC = step_CC * (maths.rows_dot_rows(q_CK, k_CK) + 1)
    last_C1 = maths.as_column(last_row(step_CC))
    return Prepared(q_CK, k_CK, v_CK - k_CK, step_CC, last_C1, scores_CC)


def output_gradient(z_CK: jax.Array, target_CK: jax.Array, norm: Norm) -> jax.Array:
    """The gradient of 1/2 |LN(z) - target|^2 with respect to z."""
    gain_1K, shift_1K = norm
    centred = z_CK - jnp.mean(z_CK, -1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(centred * centred, -1, keepdims=True) + EPSILON)
    standard = centred * scale
    inner = (standard * gain_1K + shift_1K - target_CK) * gain_1K
    along = jnp.mean(inner * standard, -1, keepdims=True)
    return (inner - jnp.mean(inner, -1, keepdims=True) - standard * along) * scale


def step_linear(maths: Maths, norm: Norm, memory: LinearMemory, block: Prepared):
    """The memory after a full block, and what its queries need of it."""
    weight_KK, bias_1K = memory
    z_CK = maths.dot(block.k_CK, weight_KK) + bias_1K
    change_CK = output_gradient(z_CK, block.target_CK, norm)
    weight_KK = weight_KK - maths.columns_dot_columns(block.last_C1 * block.k_CK, change_CK)
    bias_1K = bias_1K - jnp.sum(block.last_C1 * change_CK, -2, keepdims=True)
    return LinearMemory(weight_KK, bias_1K), change_CK


def finish_linear(maths: Maths, norm: Norm, memory: LinearMemory, block: Prepared, change_CK):
    """Outputs, from the memory that entered the block."""
    weight_KK, bias_1K = memory
    z_CK = maths.dot(block.q_CK, weight_KK) + bias_1K - maths.dot(block.scores_CC, change_CK)
    return block.q_CK + normalise(z_CK, norm)


def step_mlp(maths: Maths, norm: Norm, memory: MLPMemory, block: Prepared):
    """As `step_linear`."""
    weight_KF, bias_1F, weight_FK, bias_1K = memory
    z_CF = maths.dot(block.k_CK, weight_KF) + bias_1F
    hidden_CF, pull = jax.vjp(jax.nn.gelu, z_CF)
    z_CK = maths.dot(hidden_CF, weight_FK) + bias_1K
    change_CK = output_gradient(z_CK, block.target_CK, norm)
    (change_CF,) = pull(maths.rows_dot_rows(change_CK, weight_FK))
    last_C1 = block.last_C1
    memory = MLPMemory(
        weight_KF - maths.columns_dot_columns(last_C1 * block.k_CK, change_CF),
        bias_1F - jnp.sum(last_C1 * change_CF, -2, keepdims=True),
        weight_FK - maths.columns_dot_columns(hidden_CF, last_C1 * change_CK),
        bias_1K - jnp.sum(last_C1 * change_CK, -2, keepdims=True),
    )
    return memory, (hidden_CF, change_CF, change_CK)


def finish_mlp(maths: Maths, norm: Norm, memory: MLPMemory, block: Prepared, kept: Any):
    """As `finish_linear`."""
    weight_KF, bias_1F, weight_FK, bias_1K = memory
    hidden_CF, change_CF, change_CK = kept
    z_CF = maths.dot(block.q_CK, weight_KF) + bias_1F
    read_CF = jax.nn.gelu(z_CF - maths.dot(block.scores_CC, change_CF))
    scores_CC = block.step_CC * (maths.rows_dot_rows(read_CF, hidden_CF) + 1)
    z_CK = maths.dot(read_CF, weight_FK) + bias_1K - maths.dot(scores_CC, change_CK)
    return block.q_CK + normalise(z_CK, norm)


def with_rows(memory: Any) -> Any:
    """Biases, every second part of a memory, as rows: `[..., K]` to `[..., 1, K]`."""
    return type(memory)(*(x[..., None, :] if i % 2 else x for i, x in enumerate(memory)))


def without_rows(memory: Any) -> Any:
    """The inverse."""
    return type(memory)(*(x[..., 0, :] if i % 2 else x for i, x in enumerate(memory)))
