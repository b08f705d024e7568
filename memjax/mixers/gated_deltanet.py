"""Gated DeltaNet: a linear memory that corrects what it holds for a key, and forgets."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from memjax.config import check
from memjax.layers import Linear
from memjax.mixers.delta import DeltaConfig, DeltaMixer

KEY_RATIO = 0.75
VALUES_PER_KEY = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedDeltaNet(DeltaConfig):
    """As `DeltaConfig`; key_size: None is 0.75 d_model / heads; value_size: twice the key size."""

    kind: ClassVar[str] = "gated_deltanet"

    def check_width(self, d_model: int) -> None:
        fits = self.key_size is not None or d_model * KEY_RATIO >= self.heads
        rule = f"leaves no key channel at d_model={d_model}; use fewer, or give key_size"
        check(self, "heads", fits, rule)


class GatedDeltaNetMixer(DeltaMixer):
    """Decay the memory, then replace what it holds for k_t by a step of size beta towards v_t.

    memory_t = decay_t memory_{t-1}
    memory_t += k_t (beta_t (v_t - memory_t^T k_t))^T
    o_t = K^(-1/2) memory_t^T q_t;   y_t = W_o (RMSNorm(o_t) * silu(W_g x_t))
    q, k, v = silu(conv(W x)), q and k of unit norm; beta = sigmoid(W_b x)
    log decay = -exp(A) softplus(W_a x + dt)

    State: the memory, float32 [B, H, K, V], and the tails of the convolutions.
    Source: arXiv:2412.06464, Eq. 10 and Sec. 3.4. Paper: alpha = decay.
    """

    def __init__(self, config: GatedDeltaNet, d_model: int, *, rngs: nnx.Rngs):
        config.check_width(d_model)
        heads = config.heads
        key_size = config.key_size or int(KEY_RATIO * d_model / heads)
        value_size = config.value_size or VALUES_PER_KEY * key_size
        super().__init__(config, d_model, key_size, value_size, rngs=rngs)
        self.decay = Linear(d_model, heads, rngs=rngs, axes=("head", "embed"))
        rate_H = jax.random.uniform(rngs.params(), (heads,), jnp.float32, 1e-2, 16.0)
        self.log_rate = nnx.Param(jnp.log(rate_H), axes=("head",))
        low, high = math.log(1e-3), math.log(1e-1)
        step_H = jnp.exp(jax.random.uniform(rngs.params(), (heads,), jnp.float32, low, high))
        self.step_bias = nnx.Param(step_H + jnp.log(-jnp.expm1(-step_H)), axes=("head",))
        self._make_readout(d_model, gated=True, rngs=rngs)

    def log_decay(self, x_BTD: jax.Array) -> jax.Array:
        step_BTH = jax.nn.softplus(self.decay(x_BTD).astype(jnp.float32) + self.step_bias[...])
        return -jnp.exp(self.log_rate[...]) * step_BTH
