"""The operations of `pallas_kernels` on whatever mesh the program runs on.

Mixers call them with the arguments of `pallas_kernels`. On one device they are those operations.
On a mesh every device works on its lanes and heads (`memjax.sharding.split`), and where tokens are
split, in the form of `pallas_kernels.context_parallel`: linear recurrences exchange summaries,
attention sends its keys round a ring, and memories that are not linear in their state take turns.

A mixer that looks along tokens through these alone (and `ShortConv`, `positions`) says so by
`splits_tokens = True`; any other is run whole, by `read_in_turns`, which is exact because any split
of a text equals the whole.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

import pallas_kernels as pk
from memjax.sharding import active, split
from pallas_kernels import context_parallel
from pallas_kernels.blocks import BlockState
from pallas_kernels.neural_memory import NeuralMemoryState


def linear_attention(q, k, v, log_decay=None, initial_state=None, reset=None, **settings):
    """`pallas_kernels.linear_attention`."""
    axes = ("BTGK", "BTGK", "BTHV", "BTHK"[: log_decay.ndim if log_decay is not None else 3])
    if q.shape[2] == v.shape[2]:
        axes = ("BTHK", "BTHK", *axes[2:])
    ways = (pk.linear_attention, context_parallel.linear_attention, settings)
    return _recurrence(ways, (q, k, v, log_decay), axes, initial_state, "BHKV", reset)


def delta_rule(q, k, v, beta, log_decay=None, initial_state=None, reset=None, **settings):
    """`pallas_kernels.delta_rule`."""
    axes = ("BTHK", "BTHK", "BTHV", "BTH", "BTHK"[: log_decay.ndim if log_decay is not None else 3])
    ways = (pk.delta_rule, context_parallel.delta_rule, settings)
    return _recurrence(ways, (q, k, v, beta, log_decay), axes, initial_state, "BHKV", reset)


def selective_scan(x, dt, A, B, C, D=None, initial_state=None, reset=None, **settings):
    """`pallas_kernels.selective_scan`."""
    axes = ("BTE", "BTE", "EN", "BTN", "BTN", "E")
    ways = (pk.selective_scan, context_parallel.selective_scan, settings)
    return _recurrence(ways, (x, dt, A, B, C, D), axes, initial_state, "BEN", reset)


def diagonal_scan(x, log_decay, initial_state=None, reset=None, **settings):
    """`pallas_kernels.diagonal_scan`."""
    ways = (pk.diagonal_scan, context_parallel.diagonal_scan, settings)
    return _recurrence(ways, (x, log_decay), ("BTE", "BTE"), initial_state, "BE", reset)


def taylor_attention(q, k, v, initial_state=None, reset=None, **settings):
    """`pallas_kernels.taylor_attention`."""
    ways = (pk.taylor_attention, context_parallel.taylor_attention, settings)
    axes = ("BTHK", "BTHK", "BTHV")
    return _recurrence(ways, (q, k, v), axes, initial_state, "BHMW", reset)


def mlstm(q, k, v, log_input, log_forget, initial_state=None, reset=None, **settings):
    """`pallas_kernels.mlstm`."""
    ways = (pk.mlstm, context_parallel.mlstm, settings)
    axes = ("BTHK", "BTHK", "BTHV", "BTH", "BTH")
    memory = pk.MLSTMMemory("BHKV", "BHK", "BH")  # type: ignore[arg-type]
    streams = (q, k, v, log_input, log_forget)
    return _recurrence(ways, streams, axes, initial_state, memory, reset)


def _recurrence(ways, streams: tuple, axes: tuple, state, state_axes, reset):
    whole, sharded, settings = ways

    def local(axis_name, state, reset, *streams):
        if axis_name is None:
            return whole(*streams, state, reset, **settings)
        return sharded(*streams, state, reset, axis_name=axis_name, **settings)

    out = "BTE" if axes[0] == "BTE" else "BTHV"
    into = (None if state is None else state_axes, "BT", *axes)
    return split(local, (state, reset, *streams), into, (out, state_axes))


def ttt_linear(q, k, v, rate, place_rate, memory, norm, state, reset, *, impl: str = "auto"):
    """`pallas_kernels.ttt_linear`."""
    consts = (place_rate, memory, norm)
    return _ttt(pk.ttt_linear, consts, state, reset, (q, k, v, rate), impl)


def ttt_mlp(q, k, v, rate, place_rate, memory, norm, state, reset, *, impl: str = "auto"):
    """`pallas_kernels.ttt_mlp`."""
    consts = (place_rate, memory, norm)
    return _ttt(pk.ttt_mlp, consts, state, reset, (q, k, v, rate), impl)


def _ttt(op: Callable, consts, state: BlockState, reset, streams, impl: str):
    step, state_axes = _Step(_ttt_step, (op, impl)), BlockState("BH", "BJH", "B")  # type: ignore[arg-type]
    axes = (("C", "H", "H"), state_axes, "BT", ("BTHK", "BTHK", "BTHK", "BTH"))
    return _turns(step, (consts, state, reset, streams), axes, "BTHK")


def _ttt_step(settings, consts, reset, state, streams):
    op, impl = settings
    o, state = op(*streams, *consts, state, reset, impl=impl)
    return state, o


def neural_memory(
    q, k, v, rate, log_keep=None, log_momentum=None, threshold=None, *,
    weights, constants, state, reset, **settings,
):  # fmt: skip
    """`pallas_kernels.neural_memory`."""
    step = _Step(_neural_memory_step, tuple(settings.items()))
    streams = (q, k, v, rate, log_keep, log_momentum, threshold)
    axes = (
        ("H", "H"),
        NeuralMemoryState("BH", "BH", "BJH", "B"),  # type: ignore[arg-type]
        "BT",
        ("BTHK", "BTHK", "BTHV", "BTH", "BTH", "BTH", "BTH"),
    )
    return _turns(step, ((weights, constants), state, reset, streams), axes, "BTHV")


def _neural_memory_step(settings, consts, reset, state, streams):
    weights, constants = consts
    o, state = pk.neural_memory(
        *streams, weights=weights, constants=constants, state=state, reset=reset, **dict(settings)
    )
    return state, o


def read_in_turns(module: Any, state: Any, x_BTD: jax.Array, reset_BT: jax.Array):
    """`module(state, x_BTD, reset_BT)` for any module that obeys the contract of mixers.

    Each device reads its lanes with all parameters; where tokens are split, one shard after the
    other, the state going from device to device.
    """
    if active() is None:
        return module(state, x_BTD, reset_BT)
    definition, params = nnx.split(module)
    axes = ("", "B", "BT", "BT")
    step = _Step(_module_step, definition)
    y_BTD, state = _turns(step, (params, state, reset_BT, x_BTD), axes, "BT", "B")
    return state, y_BTD


def _module_step(definition, params, reset, state, x):
    return nnx.merge(definition, params)(state, x, reset)


@dataclasses.dataclass(frozen=True)
class _Step:
    """`run(settings, consts, reset, state, xs) -> (state, y)`; compared and hashed."""

    run: Callable
    settings: Any

    def __call__(self, consts, reset, state, xs):
        return self.run(self.settings, consts, reset, state, xs)


def _turns(step: _Step, args: tuple, axes: tuple, out_axes: str, state_axes: Any = None):
    """y and the state; where tokens are split, shards in turn, in parts that keep devices busy.

    args: consts, state, reset, xs.
    """

    def local(axis_name, consts, state, reset, xs):
        if axis_name is None:
            state, y = step(consts, reset, state, xs)
            return y, state
        lanes, size = reset.shape[0], jax.lax.axis_size(axis_name)
        parts = max(n for n in range(1, size + 1) if lanes % n == 0)
        state, y = context_parallel.in_turn(
            step, consts, reset, state, xs, axis_name=axis_name, parts=parts
        )
        return y, state

    return split(local, args, axes, (out_axes, axes[1] if state_axes is None else state_axes))


def last_token(x_BT: jax.Array) -> jax.Array:
    """x_BT[:, -1]."""

    def local(axis_name, x_BT):
        last_B = x_BT[:, -1]
        return last_B if axis_name is None else context_parallel.of_last(last_B, axis_name)

    return split(local, (x_BT,), ("BT",), "B")
