"""How programs use parameters that are split over a mesh: whole, in their layer; sums in parts.

A layer gathers its parameters over fsdp when it runs, and again for its backward pass. A gradient
is a sum over lanes and tokens, on all devices: each is sent the sum of its own part (a
reduce-scatter over fsdp), and over data and context these parts are summed then, and not the whole.
Compilers find the first by themselves, and not the second, so it is written out (`sum_to_parts`).
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh as JaxMesh
from jax.sharding import NamedSharding

from memjax.sharding import Spec, active, axis_size, constrain, spec_of, splits


def gather(param: nnx.Variable) -> jax.Array:
    """A parameter as products use it: whole over fsdp. Its gradient is split as it is stored.

    A parameter with the metadata `summed` has its gradient from `sum_to_parts`.
    """
    value, mesh = param[...], active()
    if mesh is None:
        return value
    metadata = param.get_metadata()
    axes = metadata["axes"]
    stored, used = (
        NamedSharding(mesh, spec_of(mesh, names, value.shape)) for names in (axes, _used(axes))
    )
    return _gather(value, stored, used, metadata.get("summed", False))


def _used(axes: tuple[str, ...]) -> tuple[str | None, ...]:
    return tuple(None if name == "embed" else name for name in axes)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(x: jax.Array, stored: NamedSharding, used: NamedSharding, summed: bool) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, used)


def _gather_forward(x, stored, used, summed):
    return _gather(x, stored, used, summed), None


def _gather_backward(stored, used, summed, _, dx):
    if not summed:
        # Summed, then split: to split it at once the compiler might gather what it is the sum of.
        dx = jax.lax.with_sharding_constraint(dx, used)
    return (jax.lax.with_sharding_constraint(dx, stored),)


_gather.defvjp(_gather_forward, _gather_backward)


def sum_to_parts(
    product: Callable[[jax.Array, jax.Array], jax.Array],
    x_BTI: jax.Array,
    dy_BTO: jax.Array,
    axes: tuple[str, ...],
) -> jax.Array:
    """product(x, dy) [O, I], a sum over lanes and tokens, split as a parameter of these axes is.

    O may be several axes.
    """
    mesh = active()
    assert mesh is not None
    shape = dy_BTO.shape[x_BTI.ndim - 1 :] + x_BTI.shape[-1:]
    used, stored = (spec_of(mesh, names, shape) for names in (_used(axes), axes))
    fits = x_BTI.ndim == 3 and x_BTI.shape[0] % axis_size(mesh, "lanes") == 0
    if not fits or x_BTI.shape[1] % axis_size(mesh, "tokens"):
        return constrain(constrain(product(x_BTI, dy_BTO), *_used(axes)), *axes)

    def local(x_BTI: jax.Array, dy_BTO: jax.Array) -> jax.Array:
        return _sum_part(product(x_BTI, dy_BTO), stored, used, over)

    given = (_used(axes)[:-1], dy_BTO), (_used(axes)[-1:], x_BTI)
    out, into = (spec_of(mesh, ("lanes", "tokens", *names), x.shape) for names, x in given)
    over, places = _axes(into[:2]), (into, out)
    run = jax.shard_map(local, mesh=mesh, in_specs=places, out_specs=stored, check_vma=False)
    return run(x_BTI, dy_BTO)


def _sum_part(dw: jax.Array, stored: Spec, used: Spec, over: tuple[str, ...]) -> jax.Array:
    """The sum over devices of what each has, split as it is stored; within `jax.shard_map`."""
    for axis, (part, whole) in enumerate(zip(map(_names, stored), map(_names, used))):
        if part == whole:
            continue
        if {*part} <= {*over}:
            dw = jax.lax.psum_scatter(dw, part, scatter_dimension=axis, tiled=True)
            over = tuple(name for name in over if name not in part)
        else:  # each device has the whole sum
            size, me = dw.shape[axis] // jax.lax.axis_size(part), jax.lax.axis_index(part)
            dw = jax.lax.dynamic_slice_in_dim(dw, me * size, size, axis)
    return jax.lax.psum(dw, over) if over else dw


def _names(part: Any) -> tuple[str, ...]:
    """The mesh axes of one axis of an array; a `Spec` has a single one as a string."""
    return (part,) if isinstance(part, str) else tuple(part or ())


def _axes(parts: Iterable[Any]) -> tuple[str, ...]:
    return tuple(name for part in parts for name in _names(part))


def look_up(param: nnx.Variable, tokens_BT: jax.Array) -> jax.Array:
    """param[tokens], the rows of a table; its gradient is summed to parts, as `sum_to_parts` does.

    Left to XLA (JAX 0.10.2, CPU) that sum was wrong on fsdp=2 tensor=2 context=2 for models that
    look up the tokens of an unfinished segment too, which two devices do not divide.
    """
    value, mesh = param[...], active()
    if mesh is None:
        return value[tokens_BT]
    return _look_up(value, tokens_BT, mesh, tuple(param.get_metadata()["axes"]))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _look_up(table_YD: jax.Array, tokens_BT: jax.Array, mesh: JaxMesh, axes: tuple) -> jax.Array:
    return constrain(table_YD, *_used(axes))[tokens_BT]


def _look_up_forward(table_YD, tokens_BT, mesh, axes):
    return _look_up(table_YD, tokens_BT, mesh, axes), (table_YD, tokens_BT)


def _look_up_backward(mesh, axes, residuals, dx_BTD):
    table_YD, tokens_BT = residuals
    used, stored = (spec_of(mesh, names, table_YD.shape) for names in (_used(axes), axes))
    places = spec_of(mesh, ("lanes", "tokens"), tokens_BT.shape)
    over = _axes(places)

    def local(tokens_BT: jax.Array, dx_BTD: jax.Array) -> jax.Array:
        rows = table_YD.shape[0]
        if used[0]:
            rows //= jax.lax.axis_size(used[0])
            tokens_BT = tokens_BT - rows * jax.lax.axis_index(used[0])
        mine_BT = (tokens_BT >= 0) & (tokens_BT < rows)
        nothing_YD = jnp.zeros((rows, table_YD.shape[1]), table_YD.dtype)
        dx_BTD = jnp.where(mine_BT[..., None], dx_BTD, 0).astype(table_YD.dtype)
        dtable_YD = nothing_YD.at[jnp.where(mine_BT, tokens_BT, 0)].add(dx_BTD)
        return _sum_part(dtable_YD, stored, used, over)

    given = (places, spec_of(mesh, ("lanes", "tokens", None), dx_BTD.shape))
    run = jax.shard_map(local, mesh=mesh, in_specs=given, out_specs=stored, check_vma=False)
    return run(tokens_BT, dx_BTD), None


_look_up.defvjp(_look_up_forward, _look_up_backward)


def copies(param: nnx.Variable) -> jax.Array | None:
    """A parameter [Y, D] as [L, S, Y, D]: a copy for the lanes and the tokens of each device.

    What reads them leaves a gradient for each copy, which no device need send, however often it is
    added to; all are summed once. None where lanes and tokens are not split.
    """
    mesh = active()
    if mesh is None or not (splits("lanes") or splits("tokens")):
        return None
    return _copies(param[...], mesh, tuple(param.get_metadata()["axes"]))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _copies(table_YD: jax.Array, mesh: JaxMesh, axes: tuple) -> jax.Array:
    shape = (axis_size(mesh, "lanes"), axis_size(mesh, "tokens"), *table_YD.shape)
    table_LSYD = jnp.broadcast_to(constrain(table_YD, *_used(axes)), shape)
    return constrain(table_LSYD, "lanes", "tokens", *_used(axes))


def _copies_forward(table_YD, mesh, axes):
    return _copies(table_YD, mesh, axes), None


def _copies_backward(mesh, axes, _, d_LSYD):
    used, stored = (spec_of(mesh, names, d_LSYD.shape[2:]) for names in (_used(axes), axes))
    given = spec_of(mesh, ("lanes", "tokens", *_used(axes)), d_LSYD.shape)
    over = _axes(given[:2])

    def local(d_LSYD: jax.Array) -> jax.Array:
        return _sum_part(d_LSYD[0, 0], stored, used, over)

    run = jax.shard_map(local, mesh=mesh, in_specs=given, out_specs=stored, check_vma=False)
    return (run(d_LSYD),)


_copies.defvjp(_copies_forward, _copies_backward)


_CHEAP = {"sharding_constraint", "reshape", "squeeze", "slice", "transpose", "convert_element_type"}


def gather_again() -> Callable | None:
    """What to keep of a layer for its backward pass, where fsdp splits parameters; else None.

    Everything but what is cheap to make again: a parameter that was gathered is gathered again,
    instead of being kept, whole, for every layer.
    """

    def policy(primitive: Any, *_: Any, **settings: Any) -> bool:
        gathers = getattr(settings.get("bwd"), "__name__", "") == _gather_backward.__name__
        return primitive.name not in _CHEAP and not gathers

    return policy if splits("embed") else None


def gathered(module: Any) -> Any:
    """A module with all its parameters gathered; called where a layer begins."""
    if active() is None:
        return module
    definition, params = nnx.split(module)
    params = jax.tree.map(
        lambda param: param.replace(gather(param)),
        params,
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )
    return nnx.merge(definition, params)
