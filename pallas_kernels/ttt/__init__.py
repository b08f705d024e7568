"""Test-time training: memories that are trained on the tokens they read."""

from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Bool, Float

from pallas_kernels import dispatch, validate
from pallas_kernels.blocks import BlockState, init_blocks
from pallas_kernels.ttt import chunked, tpu
from pallas_kernels.ttt.reference import ttt_linear_reference, ttt_mlp_reference
from pallas_kernels.ttt.rule import LinearMemory, MLPMemory, Norm

__all__ = ["LinearMemory", "MLPMemory", "Norm", "init_ttt", "ttt_linear", "ttt_mlp"]

LINEAR_IMPLEMENTATIONS = {
    "reference": ttt_linear_reference,
    "xla": partial(chunked.ttt_chunked, chunked.LINEAR),
    "tpu": partial(tpu.ttt_tpu, tpu.LINEAR),
}
MLP_IMPLEMENTATIONS = {
    "reference": ttt_mlp_reference,
    "xla": partial(chunked.ttt_chunked, chunked.MLP),
    "tpu": partial(tpu.ttt_tpu, tpu.MLP),
}


def init_ttt(memory: LinearMemory | MLPMemory, batch: int, *, update_every: int) -> BlockState:
    """The state at the start of a document: the memory given, and no tokens."""
    heads, size = memory[-1].shape
    vectors = jax.ShapeDtypeStruct((batch, 1, heads, size), memory[-1].dtype)
    rates = jax.ShapeDtypeStruct((batch, 1, heads), memory[-1].dtype)
    return init_blocks(memory, (vectors, vectors, rates), block=update_every)


def ttt_linear(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H K"],
    rate: Float[Array, "B T H"],
    place_rate: Float[Array, " C"],
    memory: LinearMemory,
    norm: Norm,
    state: BlockState | None = None,
    reset: Bool[Array, "B T"] | None = None,
    *,
    impl: str = "auto",
) -> tuple[Float[Array, "B T H K"], BlockState]:
    """A matrix that takes gradient steps on the tokens it reads, C tokens to a step (TTT-Linear).

        f(x; W, c) = x + LN(x W + c);  loss_j = 1/2 |f(k_j; W, c) - v_j|^2
        in a block of C tokens, entered with W_0:
        W_i = W_0 - place_rate_i sum_{j <= i} rate_j dloss_j/dW at W_0   (and c likewise)
        o_i = f(q_i; W_i, c_i);  after C tokens W_0 = W_C

    The blocks are counted from the start of the document: C, the length of `place_rate`, is part of
    the mathematics. place_rate_i multiplies all steps so far, those of earlier tokens too.
    Shapes: q, k, v, o `[B, T, H, K]`; rate `[B, T, H]`; memory: W `[H, K, K]` and c `[H, K]`, which
    every document starts with; norm: scale and shift of LN, `[H, K]`. State: `BlockState` with the
    memory of each lane before the current block, `[B, ...]` float32, and k, v and rate of the
    block's tokens so far; None is the start of a document.
    Units: rate is a step size for the loss above, at least 0; not checked.
    A true `reset` at t starts a document, and a block, at token t.
    Any T from 1. Returns o in the dtype of q, and the state after the last token. Differentiable in
    every floating argument, through the inner gradients (second order) and the state. Computed in
    float32 for bfloat16 inputs too.
    Errors: ValueError for shapes or dtypes that disagree, or an implementation that is not
    available.
    Source: arXiv:2407.04620, Sec. 2.4 to 2.7. Paper: rate = eta, K = d, C = b.
    """
    axes = dict(weight="HKK", bias="HK")
    return _run(
        "ttt_linear", LINEAR_IMPLEMENTATIONS, axes, q, k, v, rate, place_rate, memory, norm,
        state, reset, impl,
    )  # fmt: skip


def ttt_mlp(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H K"],
    rate: Float[Array, "B T H"],
    place_rate: Float[Array, " C"],
    memory: MLPMemory,
    norm: Norm,
    state: BlockState | None = None,
    reset: Bool[Array, "B T"] | None = None,
    *,
    impl: str = "auto",
) -> tuple[Float[Array, "B T H K"], BlockState]:
    """`ttt_linear` with two layers for a memory (TTT-MLP).

        f(x; W, c, U, d) = x + LN(gelu(x W + c) U + d)

    All four are learned at test time, from gradients at the weights that entered the block; gelu by
    its tanh approximation. memory: W `[H, K, F]`, c `[H, F]`, U `[H, F, K]`, d `[H, K]`.
    Source: arXiv:2407.04620, Sec. 2.6 and Appendix A.
    """
    axes = dict(weight_in="HKF", bias_in="HF", weight_out="HFK", bias_out="HK")
    return _run(
        "ttt_mlp", MLP_IMPLEMENTATIONS, axes, q, k, v, rate, place_rate, memory, norm,
        state, reset, impl,
    )  # fmt: skip


def _run(
    op: str, implementations: dict[str, Any], axes: dict[str, str], q, k, v, rate, place_rate,
    memory, norm, state, reset, impl: str,
):  # fmt: skip
    validate.check_axes(
        op,
        q=(q, "BTHK"),
        k=(k, "BTHK"),
        v=(v, "BTHK"),
        rate=(rate, "BTH"),
        place_rate=(place_rate, "C"),
        **{name: (x, axes[name]) for name, x in zip(axes, memory, strict=True)},
        norm_scale=(norm.scale_HK, "HK"),
        norm_shift=(norm.shift_HK, "HK"),
        reset=(reset, "BT"),
    )
    validate.check_floating(op, q=q, k=k, v=v, rate=rate, place_rate=place_rate)
    validate.check_reset(op, reset)
    validate.check_tokens(op, q.shape[1])
    if state is None:
        state = init_ttt(memory, len(q), update_every=len(place_rate))
    unfit = {"tpu": lambda: tpu.unfit(q, k, v, memory, block=len(place_rate))}
    chosen = dispatch.resolve(op, impl, unfit)
    with jax.named_scope(f"{op}_{chosen}"):
        return implementations[chosen](q, k, v, rate, place_rate, memory, norm, state, reset)
