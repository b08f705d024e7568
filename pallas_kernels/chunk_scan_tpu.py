"""One Pallas kernel for every chunked recurrence on a TPU.

    out_n, carry_{n+1} = body(consts, fixed_n, xs_n, carry_n)        n = 0 .. chunks - 1

The body is plain jnp on matrices of one lane (one head of one row of the batch). The grid is
(lanes, chunks): lanes in parallel, chunks in order, the carry in VMEM. The forward pass for a
gradient also writes the carry that enters each chunk. The backward pass visits the chunks in
reverse and traces `jax.vjp` of the body inside the kernel, so its equations stand in one place:

    d_consts, d_xs_n, d_carry_n = vjp of body at (consts, xs_n, carry_n) of (d_out_n, d_carry_{n+1})
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import compat

Body = Callable[[Any, Any, Any, Any], tuple[jax.Array, Any]]
Shaped = jax.Array | jax.ShapeDtypeStruct


class Plan(NamedTuple):
    """What decides the program. The body is compared and hashed: a function of module level, or a
    frozen value with `__call__`.
    """

    body: Body
    length: int  # tokens a chunk
    out_dtype: Any
    interpreter: Any


def chunk_scan(plan: Plan, consts: Any, fixed: Any, xs: Any, carry: Any) -> tuple[jax.Array, Any]:
    """Outputs `[N, L, V]` and the last carry; L a multiple of `plan.length`.

    consts: pytree of `[N, rows, columns]`, the same for all chunks. fixed, xs: pytrees of
    `[N, L, columns]`, or of `[N, chunks, rows, C]` where a token is a column; those of `fixed` may
    have fewer lanes, each shared by as many in a row. carry: pytree of `[N, rows, columns]`.
    The body gets and returns float32. Differentiable in consts, xs and carry; not in fixed.
    """
    return _scan(plan, consts, fixed, xs, carry)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(plan, consts, fixed, xs, carry):
    out, last, _ = _forward(plan, consts, fixed, xs, carry, save=False)
    return out, last


def _scan_forward(plan, consts, fixed, xs, carry):
    out, last, entering = _forward(plan, consts, fixed, xs, carry, save=True)
    return (out, last), (consts, fixed, xs, entering)


def _scan_backward(plan, residuals, cotangents):
    consts, fixed, xs, entering = residuals
    d_consts, d_xs, d_carry = _backward(plan, consts, fixed, xs, entering, *cotangents)
    return d_consts, None, d_xs, d_carry


_scan.defvjp(_scan_forward, _scan_backward)


class _Specs(NamedTuple):
    """Which block of an array a step of the grid (lane n, chunk c) holds."""

    lanes: int
    length: int
    reverse: int | None  # the number of chunks, to visit them from the last

    def _chunk(self, c):
        return c if self.reverse is None else self.reverse - 1 - c

    def tokens(self, x: Shaped) -> pl.BlockSpec:
        share = self.lanes // x.shape[0]
        if x.ndim == 3:
            block: tuple = (None, self.length, x.shape[2])
            return pl.BlockSpec(block, lambda n, c: (_shared(n, share), self._chunk(c), 0))
        block = (None, None, *x.shape[2:])
        return pl.BlockSpec(block, lambda n, c: (_shared(n, share), self._chunk(c), 0, 0))

    def lane(self, x: Shaped) -> pl.BlockSpec:
        return pl.BlockSpec((None, *x.shape[1:]), lambda n, c: (n, 0, 0))

    def chunk(self, x: Shaped) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda n, c: (n, self._chunk(c), 0, 0))


def _shared(n, share: int):
    # lax.div truncates: for numbers from 0 it is the quotient, and Mosaic has it on every TPU
    return n if share == 1 else jax.lax.div(n, jnp.int32(share))


def _read(refs: Any) -> Any:
    return jax.tree.map(lambda ref: ref[...].astype(jnp.float32), refs)


def _write(refs: Any, values: Any) -> None:
    for ref, value in zip(jax.tree.leaves(refs), jax.tree.leaves(values), strict=True):
        ref[...] = value.astype(ref.dtype)


def _tile(x: Shaped, length: int) -> jax.ShapeDtypeStruct:
    rows = length if x.ndim == 3 else x.shape[2]
    return jax.ShapeDtypeStruct((rows, x.shape[-1]), jnp.float32)


def _compiler(grid: tuple[int, int], plan: Plan) -> dict[str, Any]:
    semantics: Any = ("parallel", "arbitrary")
    return dict(
        grid=grid,
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
        interpret=False if plan.interpreter is None else plan.interpreter,
    )


def _forward(plan: Plan, consts, fixed, xs, carry, *, save: bool):
    first = jax.tree.leaves(carry)[0]
    lanes, chunks = first.shape[0], _chunks(plan, xs)
    specs = _Specs(lanes, plan.length, None)
    tile = partial(_tile, length=plan.length)
    whole = [jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], jnp.float32), t)
             for t in (consts, carry)]  # fmt: skip
    tokens = [jax.tree.map(tile, t) for t in (fixed, xs)]
    out_tile = jax.eval_shape(plan.body, whole[0], *tokens, whole[1])[0]

    def kernel(consts_ref, fixed_ref, xs_ref, first_ref, *refs):
        out_ref, last_ref, *entering_ref, held = refs

        @pl.when(pl.program_id(1) == 0)
        def _():
            _write(held, _read(first_ref))

        before = _read(held)
        if save:
            _write(entering_ref[0], before)
        out, after = plan.body(_read(consts_ref), _read(fixed_ref), _read(xs_ref), before)
        out_ref[...] = out.astype(out_ref.dtype)
        _write(held, after)

        @pl.when(pl.program_id(1) == chunks - 1)
        def _():
            _write(last_ref, after)

    def float32(shape, x):
        return compat.like(shape, jnp.float32, x)

    out_shape = [
        compat.like((lanes, chunks * plan.length, out_tile.shape[1]), plan.out_dtype, first),
        jax.tree.map(lambda x: float32(x.shape, first), carry),
    ]
    out_specs = [specs.tokens(out_shape[0]), jax.tree.map(specs.lane, carry)]
    if save:
        each = jax.tree.map(lambda x: float32((lanes, chunks, *x.shape[1:]), first), carry)
        out_shape.append(each)
        out_specs.append(jax.tree.map(specs.chunk, each))
    results = pl.pallas_call(
        kernel,
        in_specs=[
            jax.tree.map(specs.lane, consts),
            jax.tree.map(specs.tokens, fixed),
            jax.tree.map(specs.tokens, xs),
            jax.tree.map(specs.lane, carry),
        ],
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=[jax.tree.map(lambda x: pltpu.VMEM(x.shape[1:], jnp.float32), carry)],
        name="chunk_scan_forward",
        **_compiler((lanes, chunks), plan),
    )(consts, fixed, xs, carry)
    return (*results, None) if not save else tuple(results)


def _backward(plan: Plan, consts, fixed, xs, entering, d_out, d_last):
    lanes, chunks = d_out.shape[0], _chunks(plan, xs)
    specs = _Specs(lanes, plan.length, chunks)

    def kernel(consts_ref, fixed_ref, xs_ref, entering_ref, d_out_ref, d_last_ref, *refs):
        d_consts_ref, d_xs_ref, d_first_ref, held, total = refs

        @pl.when(pl.program_id(1) == 0)
        def _():
            _write(held, _read(d_last_ref))
            _write(total, jax.tree.map(lambda ref: jnp.zeros(ref.shape, ref.dtype), total))

        fixed_tile = _read(fixed_ref)
        _, pull = jax.vjp(
            lambda consts, xs, carry: plan.body(consts, fixed_tile, xs, carry),
            _read(consts_ref),
            _read(xs_ref),
            _read(entering_ref),
        )
        d_consts, d_xs, d_carry = pull((d_out_ref[...].astype(jnp.float32), _read(held)))
        _write(d_xs_ref, d_xs)
        _write(held, d_carry)
        _write(total, jax.tree.map(lambda ref, d: ref[...] + d, total, d_consts))

        @pl.when(pl.program_id(1) == chunks - 1)
        def _():
            _write(d_first_ref, d_carry)
            _write(d_consts_ref, _read(total))

    def same(x):
        return compat.like(x.shape, x.dtype, d_out)

    d_first = jax.tree.map(
        lambda x: compat.like((lanes, *x.shape[2:]), jnp.float32, d_out), entering
    )
    in_specs = [
        jax.tree.map(specs.lane, consts),
        jax.tree.map(specs.tokens, fixed),
        jax.tree.map(specs.tokens, xs),
        jax.tree.map(specs.chunk, entering),
        specs.tokens(d_out),
        jax.tree.map(specs.lane, d_last),
    ]
    scratch = [
        jax.tree.map(lambda x: pltpu.VMEM(x.shape[1:], jnp.float32), tree)
        for tree in (d_first, consts)
    ]
    return pl.pallas_call(
        kernel,
        in_specs=in_specs,
        out_specs=[in_specs[0], in_specs[2], jax.tree.map(specs.lane, d_first)],
        out_shape=[jax.tree.map(same, consts), jax.tree.map(same, xs), d_first],
        scratch_shapes=scratch,
        name="chunk_scan_backward",
        **_compiler((lanes, chunks), plan),
    )(consts, fixed, xs, entering, d_out, d_last)


def _chunks(plan: Plan, xs: Any) -> int:
    x = jax.tree.leaves(xs)[0]
    return x.shape[1] // plan.length if x.ndim == 3 else x.shape[1]
