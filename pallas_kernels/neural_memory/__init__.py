"""Memories that learn at test time: four choices, one operation.

structure   what the memory computes from a key            structures.py
bias        what it calls an error                         biases.py
retention   what it keeps                                  retentions.py
learner     how it learns from a gradient                  learners.py
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels import dispatch, validate
from pallas_kernels.neural_memory import tpu
from pallas_kernels.neural_memory.biases import BIASES, L2, Bias, DotProduct, Huber, Lp, Robust
from pallas_kernels.neural_memory.chunked import neural_memory_chunked, read, whole_blocks
from pallas_kernels.neural_memory.learners import (
    LEARNERS,
    GradientDescent,
    Learner,
    Momentum,
    Nesterov,
)
from pallas_kernels.neural_memory.reference import neural_memory_reference
from pallas_kernels.neural_memory.retentions import (
    KL,
    RETENTIONS,
    ElasticNet,
    KeepAll,
    Lq,
    Mirror,
    Retention,
    WeightDecay,
)
from pallas_kernels.neural_memory.rule import Memory, NeuralMemoryState, Rule, lanes, start
from pallas_kernels.neural_memory.structures import (
    MLP,
    STRUCTURES,
    GatedMLP,
    LinearMap,
    Structure,
)
from pallas_kernels.products import accumulation_dtype

OP = "neural_memory"
IMPLEMENTATIONS = {
    "reference": neural_memory_reference,
    "xla": neural_memory_chunked,
    "tpu": tpu.neural_memory_tpu,
}

__all__ = [
    "BIASES",
    "KL",
    "L2",
    "LEARNERS",
    "MLP",
    "RETENTIONS",
    "STRUCTURES",
    "Bias",
    "DotProduct",
    "ElasticNet",
    "GatedMLP",
    "GradientDescent",
    "Huber",
    "KeepAll",
    "Learner",
    "LinearMap",
    "Lp",
    "Lq",
    "Memory",
    "Mirror",
    "Momentum",
    "Nesterov",
    "NeuralMemoryState",
    "Retention",
    "Robust",
    "Rule",
    "Structure",
    "WeightDecay",
    "init_neural_memory",
    "lanes",
    "neural_memory",
    "read",
    "start",
    "whole_blocks",
]


def neural_memory(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    rate: Float[Array, "B T H"],
    log_keep: Float[Array, "B T H"] | None = None,
    log_momentum: Float[Array, "B T H"] | None = None,
    threshold: Float[Array, "B T H"] | None = None,
    *,
    weights: tuple[Float[Array, "H _ _"], ...],
    constants: dict[str, Float[Array, "H V"]] | None = None,
    state: NeuralMemoryState | None = None,
    reset: Bool[Array, "B T"] | None = None,
    update_every: int = 16,
    structure: Structure = MLP(),
    bias: Bias = L2(),
    retention: Retention = WeightDecay(),
    learner: Learner = Momentum(),
    impl: str = "auto",
) -> tuple[Float[Array, "B T H V"], NeuralMemoryState]:
    """A network that is trained on every token it reads to answer key k_t with value v_t.

        u_t = gradient of bias(structure(W_block; k_t), v_t) in W_block = retention(A_block)
        S_t = exp(log_momentum_t) S_{t-1} - rate_t u_t           (without momentum: -rate_t u_t)
        A_t = exp(log_keep_t) A_{t-1} + S_t;  W_t likewise, from W_block
        o_t = structure(W_t; q_t)

    where A_block is A as the block of `update_every` tokens found it. Blocks are counted from the
    start of each document; `update_every` changes the mathematics, and tokens of an unfinished
    block are carried in the state, so that any split of a stream gives the same results.

    Shapes: q, k `[B, T, H, K]`; v and o `[B, T, H, V]`; rate, log_keep (None: 1 is kept),
    log_momentum, threshold `[B, T, H]`. weights: A at the start of a document, `[H, in, out]` each,
    of `structure.shapes(K, V)`; constants: what of the structure is not rewritten, `[H, V]` each.
    Units: rate at least 0; log_keep and log_momentum natural logarithms, at most 0.
    A true `reset` at t restores `weights`, and a momentum of 0, before token t.
    Returns o in the dtype of q and the state after the last token, float32 (float64 if q, k or v
    is). Everything is computed in that type. Differentiable in every floating argument, through
    the inner gradients too; memory grows with T as the states at block starts do, not as T weights.
    Errors: ValueError for shapes or dtypes that disagree, update_every < 1, streams that the
    choices need and that are missing or that they have no use for, positive logarithms (where
    known), or an implementation that is not available.
    Source: arXiv:2501.00663, Eqs. 8-18 (paper: eta = exp(log_momentum), theta = rate, 1 - alpha =
    exp(log_keep)); the four choices arXiv:2504.13173, Sec. 3.
    Differs from paper: the gates are one a head, which the dual form needs.
    """
    constants = {} if constants is None else constants
    rule = Rule(structure, bias, retention, learner)
    streams = {"q": q, "k": k, "v": v, "rate": rate, "log_keep": log_keep}
    streams |= {"log_momentum": log_momentum, "threshold": threshold}
    _check(rule, streams, weights, constants, reset, update_every)
    unfit = {"tpu": lambda: tpu.unfit(rule, q, k, v, weights, update_every=update_every)}
    chosen = dispatch.resolve(OP, impl, unfit)
    dtype = accumulation_dtype(q, k, v)
    tokens = {name: x.astype(dtype) for name, x in streams.items() if x is not None}
    if state is None:
        state = init_neural_memory(rule, weights, tokens, update_every=update_every)
    initial = start(rule, tuple(w.astype(dtype) for w in weights))
    with jax.named_scope(f"{OP}_{chosen}"):
        o, state = IMPLEMENTATIONS[chosen](
            rule, tokens, weights, constants, initial, state, reset, update_every=update_every
        )
    return o.astype(q.dtype), state


def init_neural_memory(rule, weights, streams, *, update_every: int) -> NeuralMemoryState:
    """The state at the start of a document; `streams` as in `neural_memory`, or their shapes."""
    batch = streams["k"].shape[0]
    dtype = accumulation_dtype(*weights)
    memory = lanes(start(rule, tuple(w.astype(dtype) for w in weights)), batch)
    tokens = {
        name: jnp.zeros((batch, update_every - 1, *x.shape[2:]), dtype)
        for name, x in streams.items()
        if name != "q"
    }
    count_B = jnp.zeros((batch,), jnp.int32)
    return NeuralMemoryState(memory.weights, memory.momenta, tokens, count_B)


def _check(rule, streams, weights, constants, reset, update_every) -> None:
    axes = {"q": "BTHK", "k": "BTHK", "v": "BTHV"}
    arrays = {name: (x, axes.get(name, "BTH")) for name, x in streams.items()}
    validate.check_axes(OP, **arrays, reset=(reset, "BT"))
    validate.check_floating(OP, **streams)
    validate.check_reset(OP, reset)
    validate.check_at_least_one(OP, update_every=update_every)
    q, v = streams["q"], streams["v"]
    validate.check_tokens(OP, q.shape[1])
    heads, key_size, value_size = q.shape[2], q.shape[3], v.shape[3]
    shapes = tuple((heads, *pair) for pair in rule.structure.shapes(key_size, value_size))
    if tuple(w.shape for w in weights) != shapes:
        got = tuple(w.shape for w in weights)
        raise ValueError(f"{OP}: weights have shapes {got}; {rule.structure} needs {shapes}")
    names = tuple(rule.structure.constants(value_size))
    if tuple(sorted(constants)) != tuple(sorted(names)):
        raise ValueError(f"{OP}: constants are {tuple(constants)}; {rule.structure} needs {names}")
    needed = {"log_momentum": rule.learner.momentum, "threshold": rule.bias.needs_threshold}
    for name, need in needed.items():
        if need == (streams[name] is None):
            owner = rule.learner if name == "log_momentum" else rule.bias
            verb = "needs" if need else "has no use for"
            raise ValueError(f"{OP}: {owner} {verb} {name}")
    if streams["log_keep"] is not None and not rule.retention.forgets:
        raise ValueError(f"{OP}: {rule.retention} has no use for log_keep")
    for name in ("log_keep", "log_momentum"):
        x = streams[name]
        if x is not None and not isinstance(x, jax.core.Tracer) and x.size:
            largest = float(jnp.max(x))
            if not largest <= 0:
                raise ValueError(f"{OP}: {name} has a value of {largest:g}; it must be at most 0")
