"""Test-time memories on a TPU: the dual form on the matrices of one head, for `blocks.tpu`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import tile_math
from pallas_kernels.blocks import tpu
from pallas_kernels.blocks.tpu import KernelBody
from pallas_kernels.neural_memory import dual
from pallas_kernels.neural_memory.chunked import run_blocks
from pallas_kernels.neural_memory.learners import GateProducts
from pallas_kernels.neural_memory.rule import Rule
from pallas_kernels.tile_math import TILES


@dataclasses.dataclass(frozen=True)
class Tile:
    """One block: its outputs, and the memory after it."""

    rule: Rule

    def __call__(self, constants: Any, xs: Any, memory: Any) -> tuple[jax.Array, Any]:
        rate_1C = xs["rate"]
        keep = _products_between(xs.get("log_keep", jnp.zeros_like(rate_1C)))
        momentum = None
        if "log_momentum" in xs:
            momentum = _products_between(xs["log_momentum"])
        rows = self.rule.learner.rows(TILES, rate_1C, keep, momentum)
        tokens = dict(xs)
        if "threshold" in xs:
            tokens["threshold"] = TILES.as_column(xs["threshold"])
        prepared = dual.Prepared(tokens, rows)
        after, writes = dual.step(TILES, self.rule, constants, memory, prepared)
        return dual.finish(TILES, self.rule, constants, memory, prepared, writes), after


def _products_between(log_gate_1C: jax.Array) -> GateProducts:
    """`learners.products_between` of a row."""
    decay = tile_math.decay_of(log_gate_1C, None, log_gate_1C.shape[1])
    gate_C1 = TILES.as_column(jnp.exp(log_gate_1C))
    return GateProducts(gate_C1, tile_math.enter(decay), tile_math.between(decay))


def unfit(rule: Rule, q, k, v, weights, *, update_every: int) -> str | None:
    """Why the kernel cannot take a call."""
    shapes = [w.shape[1:] for w in weights] * (2 if rule.learner.momentum else 1)
    return tpu.unfit(update_every, shapes, q=q, k=k, v=v)


def neural_memory_tpu(rule, tokens, weights, constants, initial, state, reset, *, update_every):
    """Same as the reference; see `pallas_kernels.neural_memory` for shapes."""
    del weights
    constants = jax.tree.map(lambda x: x.astype(jnp.float32), dual.constant_rows(constants))
    body = KernelBody(Tile(rule))
    return run_blocks(body, tokens, constants, initial, state, reset, update_every=update_every)
