"""Any memory over a sharded sequence: its state goes from device to device."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import compat
from pallas_kernels.context_parallel.tokens import of_last

Step = Callable[[Any, Any, Any, Any], tuple[Any, Any]]


class _Plan(NamedTuple):
    step: Step
    axis_name: str
    parts: int


def in_turn(
    step: Step, consts: Any, fixed: Any, state: Any, xs: Any, *, axis_name: str, parts: int = 1
) -> tuple[Any, Any]:
    """A recurrence over shards of a sequence, one device after the other.

        state, y = step(consts, fixed_i, state, xs_i)            for shard i = 0, 1, ...

    consts: what all tokens share (parameters).  fixed, xs, y: arrays of this shard, lanes on axis
    0; fixed is not differentiated (resets).  state: lanes on axis 0, the same on all devices;
    integers in it (counters) are passed on like the rest.
    `parts`: the lanes are cut in so many; while one device works on a part, the device before it
    works on the next. It must divide the lanes. With n devices each is busy for `parts` turns of
    `parts + n - 1`.
    Returns the state behind the last shard, the same on all devices, and y.
    Differentiable in consts, state and xs: the backward pass takes turns from the last device to
    the first, computes each shard once more from the state that entered it, and stores nothing
    else. `step` is compared and hashed: a function of module level, or a frozen value.
    """
    first = jax.tree.leaves(xs)[0]
    if parts < 1 or first.shape[0] % parts:
        raise ValueError(
            f"in_turn: parts={parts} must divide the {first.shape[0]} lanes of a device"
        )
    lead = compat.vary_like(first, lax.axis_index(axis_name))
    consts, fixed, state, xs = compat.vary_like((consts, fixed, state, xs), lead)
    state, y = _in_turn(_Plan(step, axis_name, parts), consts, fixed, state, xs)
    return of_last(state, axis_name), y


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_turn(plan: _Plan, consts, fixed, state, xs):
    """The states that leave each device, and y."""
    (last, y), _ = _forward(plan, consts, fixed, state, xs)
    return last, y


def _part(tree: Any, index: jax.Array, parts: int) -> Any:
    def take(x: jax.Array) -> jax.Array:
        size = x.shape[0] // parts
        return lax.dynamic_slice_in_dim(x, index * size, size)

    return jax.tree.map(take, tree)


def _put(tree: Any, values: Any, index: jax.Array, active: jax.Array) -> Any:
    def put(x: jax.Array, value: jax.Array) -> jax.Array:
        size = value.shape[0]
        held = lax.dynamic_slice_in_dim(x, index * size, size)
        value = jnp.where(active, value.astype(x.dtype), held)
        return lax.dynamic_update_slice_in_dim(x, value, index * size, 0)

    return jax.tree.map(put, tree, values)


def _pick(condition: jax.Array, left: Any, right: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), left, right)


def _zeros(shapes: Any, like: jax.Array) -> Any:
    return compat.vary_like(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), like)


def _shift(tree: Any, plan: _Plan, step: int) -> Any:
    size = lax.axis_size(plan.axis_name)
    pairs = [(i, i + step) for i in range(size) if 0 <= i + step < size]
    return jax.tree.map(lambda x: lax.ppermute(x, plan.axis_name, pairs), tree)


def _is_floating(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _floating(tree: Any) -> list[jax.Array]:
    return [x for x in jax.tree.leaves(tree) if _is_floating(x)]


def _with_floating(tree: Any, values: list[jax.Array]) -> Any:
    """`tree` with its floating arrays replaced by `values`, in order."""
    rest = iter(values)
    return jax.tree.map(lambda x: next(rest) if _is_floating(x) else x, tree)


def _cotangent(tree: Any, values: list[jax.Array]) -> Any:
    """A cotangent of `tree`: `values` for its floating arrays; integers have none."""
    rest = iter(values)
    none = jax.dtypes.float0
    return jax.tree.map(lambda x: next(rest) if _is_floating(x) else np.zeros(x.shape, none), tree)


def _turn(plan: _Plan, turn: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which part this device works on, whether it does, and which device it is."""
    me = lax.axis_index(plan.axis_name)
    part = turn - me
    return jnp.clip(part, 0, plan.parts - 1), (part >= 0) & (part < plan.parts), me


def _forward(plan: _Plan, consts, fixed, state, xs):
    like = jax.tree.leaves(xs)[0]
    turns = lax.axis_size(plan.axis_name) + plan.parts - 1
    shapes = jax.eval_shape(plan.step, consts, fixed, state, xs)
    nothing = _zeros(_part(state, jnp.int32(0), plan.parts), like)

    def one(turn, loop):
        message, entering, last, y = loop
        part, active, me = _turn(plan, turn)
        before = _pick(me == 0, _part(state, part, plan.parts), message)
        inputs = (_part(fixed, part, plan.parts), before, _part(xs, part, plan.parts))

        def work():
            after, out = plan.step(consts, *inputs)
            after = jax.tree.map(lambda x, like: x.astype(like.dtype), after, before)
            return compat.vary_like((after, out), like)

        idle = _zeros(jax.eval_shape(work), like)
        after, out = lax.cond(active, work, lambda: idle)
        return (
            _shift(after, plan, 1),
            _put(entering, before, part, active),
            _put(last, after, part, active),
            _put(y, out, part, active),
        )

    loop = (nothing, _zeros(state, like), _zeros(state, like), _zeros(shapes[1], like))
    _, entering, last, y = lax.fori_loop(0, turns, one, loop)
    return (last, y), (consts, fixed, entering, xs)


def _backward(plan: _Plan, residuals, cotangents):
    consts, fixed, entering, xs = residuals
    d_last, d_y = _floating(cotangents[0]), cotangents[1]
    like = jax.tree.leaves(xs)[0]
    turns = lax.axis_size(plan.axis_name) + plan.parts - 1

    def one(step, loop):
        message, d_consts, d_state, d_xs = loop
        part, active, me = _turn(plan, turns - 1 - step)
        fixed_part, before, xs_part = _part((fixed, entering, xs), part, plan.parts)
        # The state of this device is used by the next one, and returned for this one.
        d_after = [x + y for x, y in zip(_part(d_last, part, plan.parts), message)]
        d_out = _part(d_y, part, plan.parts)

        def again(consts, floating, xs):
            after, out = plan.step(consts, fixed_part, _with_floating(before, floating), xs)
            after = [x.astype(y.dtype) for x, y in zip(_floating(after), floating)]
            return compat.vary_like((after, out), like)

        def work():
            _, pull = jax.vjp(again, consts, _floating(before), xs_part)
            return pull((d_after, d_out))

        idle = _zeros((consts, _floating(before), xs_part), like)
        more_consts, d_before, more_xs = lax.cond(active, work, lambda: idle)
        return (
            _shift(d_before, plan, -1),
            jax.tree.map(jnp.add, d_consts, more_consts),
            _put(d_state, d_before, part, active & (me == 0)),
            _put(d_xs, more_xs, part, active),
        )

    held = _floating(entering)
    nothing = _zeros(_part(held, jnp.int32(0), plan.parts), like)
    loop = (nothing, _zeros(consts, like), _zeros(held, like), _zeros(xs, like))
    _, d_consts, d_state, d_xs = lax.fori_loop(0, turns, one, loop)
    return d_consts, None, _cotangent(entering, d_state), d_xs


_in_turn.defvjp(_forward, _backward)
