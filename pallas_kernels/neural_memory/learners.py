"""How a memory learns from a gradient: what one write still weighs t tokens later.

With u_j the gradient of token j at the weights at the start of the block, the weights and the
momentum after token t of a block are

    W_t = kept_t W_0 + surprise_t S_0 - sum_{j <= t} write_tj u_j
    S_t = passed_t S_0 - sum_{j <= t} push_tj u_j

Adding a learner is a frozen dataclass with `rows` and a line in `LEARNERS`.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.chunks import COARSE_STEP, LOG_DECAY_FLOOR
from pallas_kernels.products import Maths


class Rows(NamedTuple):
    """The factors above, of columns and matrices. Without momentum the last three are None."""

    kept_C1: jax.Array
    write_CC: jax.Array
    surprise_C1: jax.Array | None
    passed_C1: jax.Array | None
    push_CC: jax.Array | None


class GateProducts(NamedTuple):
    """A gate, its products over tokens 0..i, and over j+1..i (0 for j > i)."""

    gate_C1: jax.Array
    until_C1: jax.Array
    between_CC: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learner:
    """Base of the learners. `momentum`: whether it carries one."""

    kind: ClassVar[str]
    momentum: ClassVar[bool]

    def rows(
        self, maths: Maths, rate_1C: jax.Array, keep: GateProducts, momentum: GateProducts | None
    ) -> Rows:
        """The factors of a block."""
        raise NotImplementedError

    def step(self, momentum: jax.Array, descent: jax.Array, gate: jax.Array) -> jax.Array:
        """What the weights move by: momentum after the token, -rate u, and the momentum gate."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientDescent(Learner):
    """W_t = keep_t W_{t-1} - rate_t u_t."""

    kind: ClassVar[str] = "gradient_descent"
    momentum: ClassVar[bool] = False

    def rows(
        self, maths: Maths, rate_1C: jax.Array, keep: GateProducts, momentum: GateProducts | None
    ) -> Rows:
        del maths, momentum
        return Rows(keep.until_C1, keep.between_CC * rate_1C, None, None, None)

    def step(self, momentum: jax.Array, descent: jax.Array, gate: jax.Array) -> jax.Array:
        del momentum, gate
        return descent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Momentum(Learner):
    """S_t = momentum_t S_{t-1} - rate_t u_t;  W_t = keep_t W_{t-1} + S_t."""

    kind: ClassVar[str] = "momentum"
    momentum: ClassVar[bool] = True

    def rows(
        self, maths: Maths, rate_1C: jax.Array, keep: GateProducts, momentum: GateProducts | None
    ) -> Rows:
        assert momentum is not None
        push_CC = momentum.between_CC * rate_1C
        # A write enters W at every later token, as long as the momentum passes it on.
        write_CC = maths.dot(keep.between_CC, push_CC)
        surprise_C1 = maths.dot(keep.between_CC, momentum.until_C1)
        return Rows(keep.until_C1, write_CC, surprise_C1, momentum.until_C1, push_CC)

    def step(self, momentum: jax.Array, descent: jax.Array, gate: jax.Array) -> jax.Array:
        del descent, gate
        return momentum


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nesterov(Learner):
    """S_t = momentum_t S_{t-1} - rate_t u_t;  W_t = keep_t W_{t-1} + momentum_t S_t - rate_t u_t.

    The momentum that looks ahead (Nesterov 1983), in the form of Sutskever et al. 2013.
    """

    kind: ClassVar[str] = "nesterov"
    momentum: ClassVar[bool] = True

    def rows(
        self, maths: Maths, rate_1C: jax.Array, keep: GateProducts, momentum: GateProducts | None
    ) -> Rows:
        assert momentum is not None
        push_CC, gate_C1 = momentum.between_CC * rate_1C, momentum.gate_C1
        write_CC = maths.dot(keep.between_CC, gate_C1 * push_CC) + keep.between_CC * rate_1C
        surprise_C1 = maths.dot(keep.between_CC, gate_C1 * momentum.until_C1)
        return Rows(keep.until_C1, write_CC, surprise_C1, momentum.until_C1, push_CC)

    def step(self, momentum: jax.Array, descent: jax.Array, gate: jax.Array) -> jax.Array:
        return gate * momentum + descent


def products_between(log_gate_BHC: jax.Array) -> GateProducts:
    """Products of the gates of a block.

    Sums of logarithms in two parts, as in `pallas_kernels.chunks`: one token that lets nothing
    through does not blur the products of those behind it. No division, no positive exponent.
    """
    log_gate_BHC = jnp.maximum(log_gate_BHC, LOG_DECAY_FLOOR)
    step_BHC = jax.lax.stop_gradient(jnp.round(log_gate_BHC / COARSE_STEP) * COARSE_STEP)
    coarse_BHC = jnp.cumsum(step_BHC, -1)
    fine_BHC = jnp.cumsum(log_gate_BHC - step_BHC, -1)
    gap_BHCC = (coarse_BHC[..., :, None] - coarse_BHC[..., None, :]) + (
        fine_BHC[..., :, None] - fine_BHC[..., None, :]
    )
    earlier_CC = jnp.tril(jnp.ones(gap_BHCC.shape[-2:], bool))
    between_BHCC = jnp.exp(jnp.where(earlier_CC, gap_BHCC, -jnp.inf))
    gate_BHC, until_BHC = jnp.exp(log_gate_BHC), jnp.exp(coarse_BHC + fine_BHC)
    return GateProducts(gate_BHC[..., None], until_BHC[..., None], between_BHCC)


LEARNERS: dict[str, type[Learner]] = {
    "gradient_descent": GradientDescent,
    "momentum": Momentum,
    "nesterov": Nesterov,
}
