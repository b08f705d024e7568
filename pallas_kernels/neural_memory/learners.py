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


class Rows(NamedTuple):
    """The factors above. Without momentum the last three are None."""

    kept_BHC: jax.Array
    write_BHCC: jax.Array
    surprise_BHC: jax.Array | None
    passed_BHC: jax.Array | None
    push_BHCC: jax.Array | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learner:
    """Base of the learners. `momentum`: whether it carries one."""

    kind: ClassVar[str]
    momentum: ClassVar[bool]

    def rows(
        self, rate_BHC: jax.Array, log_keep_BHC: jax.Array, log_momentum_BHC: jax.Array | None
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
        self, rate_BHC: jax.Array, log_keep_BHC: jax.Array, log_momentum_BHC: jax.Array | None
    ) -> Rows:
        del log_momentum_BHC
        kept_BHC, keeps_BHCC = products_between(log_keep_BHC)
        return Rows(kept_BHC, keeps_BHCC * rate_BHC[..., None, :], None, None, None)

    def step(self, momentum: jax.Array, descent: jax.Array, gate: jax.Array) -> jax.Array:
        del momentum, gate
        return descent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Momentum(Learner):
    """S_t = momentum_t S_{t-1} - rate_t u_t;  W_t = keep_t W_{t-1} + S_t."""

    kind: ClassVar[str] = "momentum"
    momentum: ClassVar[bool] = True

    def rows(
        self, rate_BHC: jax.Array, log_keep_BHC: jax.Array, log_momentum_BHC: jax.Array | None
    ) -> Rows:
        assert log_momentum_BHC is not None
        kept_BHC, keeps_BHCC = products_between(log_keep_BHC)
        passed_BHC, passes_BHCC = products_between(log_momentum_BHC)
        push_BHCC = passes_BHCC * rate_BHC[..., None, :]
        # A write enters W at every later token, as long as the momentum passes it on.
        both_BHCD = keeps_BHCC @ jnp.concatenate([push_BHCC, passed_BHC[..., None]], -1)
        return Rows(kept_BHC, both_BHCD[..., :-1], both_BHCD[..., -1], passed_BHC, push_BHCC)

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
        self, rate_BHC: jax.Array, log_keep_BHC: jax.Array, log_momentum_BHC: jax.Array | None
    ) -> Rows:
        assert log_momentum_BHC is not None
        assert log_momentum_BHC is not None
        kept_BHC, keeps_BHCC = products_between(log_keep_BHC)
        passed_BHC, passes_BHCC = products_between(log_momentum_BHC)
        push_BHCC = passes_BHCC * rate_BHC[..., None, :]
        gate_BHC1 = jnp.exp(log_momentum_BHC)[..., None]
        moves_BHCD = gate_BHC1 * jnp.concatenate([push_BHCC, passed_BHC[..., None]], -1)
        both_BHCD = keeps_BHCC @ moves_BHCD
        write_BHCC = both_BHCD[..., :-1] + keeps_BHCC * rate_BHC[..., None, :]
        return Rows(kept_BHC, write_BHCC, both_BHCD[..., -1], passed_BHC, push_BHCC)

    def step(self, momentum: jax.Array, descent: jax.Array, gate: jax.Array) -> jax.Array:
        return gate * momentum + descent


def products_between(log_gate_BHC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Products of gates over tokens 0..i `[B, H, C]`, and over j+1..i `[B, H, C, C]`, 0 for j > i.

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
    return jnp.exp(coarse_BHC + fine_BHC), between_BHCC


LEARNERS: dict[str, type[Learner]] = {
    "gradient_descent": GradientDescent,
    "momentum": Momentum,
    "nesterov": Nesterov,
}
